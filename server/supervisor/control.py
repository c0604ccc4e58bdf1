"""Client of the SuperLink's control API, which is faster than its command line, where each call takes seconds."""

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
    """Client of one SuperLink's control API.

    Args:
        authority: certificate of the SuperLink's authority; None: it listens without TLS.
    """

    def __init__(self, address: str, authority: Path | None) -> None:
        self._address, self._authority = address, authority

    def check(self) -> None:
        """Check that the SuperLink and its database answer.

        Raises:
            AntherError: they don't answer.
        """
        with self._client() as client:
            client.ListNodes(ListNodesRequest())

    def nodes(self) -> dict[str, int]:
        """Return ids of the registered nodes, by public key in OpenSSH's form."""
        with self._client() as client:
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
        registered = [node for node in nodes if node.status != "unregistered" and node.public_key]
        return {to_openssh(load_pem_public_key(node.public_key)): node.node_id for node in registered}

    def register(self, key: str, name: str) -> int:
        """Register a node with this public key, and return its id."""
        public = load_ssh_public_key(key.encode())
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        with self._client() as client:
            return int(client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name)).node_id)

    def unregister(self, node: int) -> None:
        with self._client() as client:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def status(self, run: int) -> str:
        """Return `pending`, `starting`, `running`, or `finished` with the outcome: `finished:completed`, …"""
        with self._client() as client:
            runs = client.ListRuns(ListRunsRequest(run_id=run)).run_dict
        if run not in runs:
            return "unknown"
        status = runs[run].status
        return f"{status.status}:{status.sub_status}" if status.sub_status else str(status.status)

    @contextmanager
    def _client(self) -> Iterator[ControlHttpClient]:
        """Open a client; errors of the SuperLink become AntherError."""
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
