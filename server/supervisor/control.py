"""The SuperLink's control API, where its command line would take seconds for each word: who is in, how a run does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from common.errors import AntherError
from server.gateway.identity import to_openssh


class ControlClient:
    """Asks one SuperLink.

    Args:
        authority: whose certificate it has to show; None: it listens without TLS.
    """

    def __init__(self, address: str, authority: Path | None) -> None:
        self._address, self._authority = address, authority

    def check(self) -> None:
        """AntherError unless the SuperLink, and its database, answer."""
        with self._client() as client:
            client.ListNodes(ListNodesRequest())

    def nodes(self) -> dict[str, int]:
        """Ids of the nodes that are registered, by their public keys as OpenSSH writes them."""
        with self._client() as client:
            found = client.ListNodes(ListNodesRequest()).nodes_info
        there = [node for node in found if node.status != "unregistered" and node.public_key]
        return {to_openssh(load_pem_public_key(node.public_key)): node.node_id for node in there}

    def register(self, key: str, name: str) -> int:
        """Let a node with this public key in; its id."""
        public = load_ssh_public_key(key.encode())
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        with self._client() as client:
            return int(client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name)).node_id)

    def unregister(self, node: int) -> None:
        with self._client() as client:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def status(self, run: int) -> str:
        """`pending`, `starting`, `running`, or `finished` with how: `finished:completed`, `finished:failed`, …"""
        with self._client() as client:
            found = client.ListRuns(ListRunsRequest(run_id=run)).run_dict
        if run not in found:
            return "unknown"
        status = found[run].status
        return f"{status.status}:{status.sub_status}" if status.sub_status else str(status.status)

    @contextmanager
    def _client(self) -> Iterator[ControlHttpClient]:
        """AntherError where the SuperLink doesn't answer, or says no."""
        client = ControlHttpClient.from_server_address(
            server_address=self._address,
            insecure=self._authority is None,
            root_certificates=None if self._authority is None else str(self._authority),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr")],
        )
        try:
            yield client
        except httpx.HTTPError as error:
            raise AntherError(f"the SuperLink at {self._address}: {error}") from error
        finally:
            client.close()
