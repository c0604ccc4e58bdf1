"""Malicious clients of Flower's fleet protocol.

    anther bench fleet_attacks ROLE FOLDER …

    mallory    enrolled and sampled like any device; misuses each message that it receives, then refuses it
    eve        enrolled, never sampled; sends malformed calls and calls with invented ids
    stranger   not enrolled: the same calls with an unknown key

`bench.robustness.gateway` starts them. Until a file named `attack` is in FOLDER, mallory only refuses and the others
wait.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.common.serde import message_to_proto
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from bench.reliability.processes import LOOPBACK
from common.atomic_files import write
from protocol import messages, records

PROTOBUF = "application/protobuf"
REPORT = messages.DeviceReport(
    device="mallory",
    base="0" * 64,
    profile="pi4_4gb",
    memory_gib=4.0,
    examples_per_second=6.0,
    watts=6.4,
    uplink_mbps=8.0,
    downlink_mbps=40.0,
)
REQUESTS: dict[str, Any] = {
    "register-node": fleet_pb2.RegisterNodeFleetRequest,
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "unregister-node": fleet_pb2.UnregisterNodeFleetRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "get-run": run_pb2.GetRunRequest,
    "get-fab": fab_pb2.GetFabRequest,
    "push-object": message_pb2.PushObjectRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
}


@dataclass
class Client:
    """Client of a federation.

    Args:
        home: folder of an enrolled device, with its key and the authority's certificate.
        port: the server's port.
        own: whether the client signs with its own key, or with an unknown one.
        base: hash of the federation's base.
    """

    home: Path
    port: int
    rng: Random
    own: bool = True
    base: str = "0" * 64
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    node: int = 0

    def __post_init__(self) -> None:
        key = load_ssh_private_key((self.home / "link" / "node.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.key = key if self.own else ec.generate_private_key(ec.SECP384R1())
        self.pem = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.trusted = ssl.create_default_context(cafile=str(self.home / "link" / "ca.pem"))
        self.http = httpx.Client(base_url=f"https://{LOOPBACK}:{self.port}", verify=self.trusted, timeout=60)

    def signed_headers(self, *, offset: float = 0.0) -> dict[str, str]:
        """Create the headers of a SuperNode whose clock is `offset` seconds ahead."""
        moment = (datetime.now(UTC) + timedelta(seconds=offset)).isoformat()
        signature = self.key.sign(moment.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": base64.b64encode(self.pem).decode(),
            "flwr-timestamp": moment,
            "flwr-signature": base64.b64encode(signature).decode(),
            "content-type": PROTOBUF,
        }

    def post(self, kind: str, call: str, body: Any, headers: Any = None, *, method: str = "POST") -> bytes | None:
        """Send one call, count it by kind and outcome, and return the answer if the call succeeded.

        Args:
            kind: kind under which the call is counted.
            call: name of the RPC, or the path to request.
            body: bytes of the request, or an iterator of them.
            headers: headers of the request (default: signed ones).
            method: HTTP method.
        """
        try:
            response = self.http.request(
                method, f"/v1/fleet/{call}", content=body, headers=self.signed_headers() if headers is None else headers
            )
        except httpx.TransportError as error:
            self.outcomes[kind, type(error).__name__] += 1
            return None
        self.outcomes[kind, str(response.status_code)] += 1
        return response.content if response.status_code == 200 else None

    def ask(self, kind: str, call: str, **fields: Any) -> bytes | None:
        """Call one RPC, count it by kind and outcome, and return the answer if it succeeded.

        Args:
            kind: kind under which the call is counted.
            call: name of the RPC.
            fields: fields of its request.
        """
        message = REQUESTS[call](**fields)
        if hasattr(message, "node") and "node" not in fields:
            message.node.node_id = self.node
        return self.post(kind, call, message.SerializeToString())

    @property
    def calls(self) -> int:
        """Number of calls made."""
        return sum(self.outcomes.values())


# Calls without a message


def honest_request(client: Client, call: str) -> Any:
    """Create a request like a SuperNode's, but with invented ids."""
    rng, message = client.rng, REQUESTS[call]()
    for name, value in (
        ("public_key", client.pem),
        ("heartbeat_interval", 30.0),
        ("run_id", rng.getrandbits(63)),
        ("node_id", client.node),
        ("object_id", f"{rng.getrandbits(256):064x}"),
        ("session_id", "0" * 32),
        ("message_object_id", f"{rng.getrandbits(256):064x}"),
        ("hash_str", f"{rng.getrandbits(256):064x}"),
        ("object_content", rng.randbytes(rng.randrange(3000))),
    ):
        if name in message.DESCRIPTOR.fields_by_name:
            setattr(message, name, value)
    if "node" in message.DESCRIPTOR.fields_by_name:
        message.node.CopyFrom(ProtoNode(node_id=client.node))
    if call == "push-messages":
        message.messages_list.add().metadata.reply_to_message_id = f"{rng.getrandbits(256):064x}"
        message.message_object_trees.add().object_id = f"{rng.getrandbits(256):064x}"
    return message


def mutate(body: bytes, rng: Random) -> bytes:
    """Damage or enlarge a body at random."""
    data = bytearray(body or b"\0")
    match rng.randrange(6):
        case 0:
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[rng.randrange(len(data)) :]
        case 2:
            data *= rng.randrange(2, 5)
        case 3:
            data += rng.randbytes(rng.randrange(1, 500))
        case 4:
            data[:0] = rng.choice(
                [b"\x0b" * 200, b"\x0a\xff\xff\xff\xff\x7f", b"\xff" * 11, b"\x12\x80\x80\x80\x80\x01"]
            )
        case _:
            data[:] = rng.randbytes(rng.randrange(2000))
    return bytes(data)


def send_malformed(client: Client) -> None:
    """Send a damaged request of a random RPC."""
    call = client.rng.choice([*REQUESTS])
    client.post(f"mutated {call}", call, mutate(honest_request(client, call).SerializeToString(), client.rng))


def send_invented_ids(client: Client) -> None:
    """Send a well-formed request with invented ids."""
    call = client.rng.choice([*set(REQUESTS) - {"activate-node", "send-node-heartbeat", "pull-messages"}])
    client.post(f"invented ids: {call}", call, honest_request(client, call).SerializeToString())


def use_other_node(client: Client) -> None:
    """Send a request with another node's id."""
    call = client.rng.choice(["pull-messages", "send-node-heartbeat", "pull-object", "deactivate-node"])
    message = honest_request(client, call)
    if call == "deactivate-node":
        message.node_id = client.rng.getrandbits(64)
    else:
        message.node.node_id = client.rng.getrandbits(64)
    client.post("another node's id", call, message.SerializeToString())


def send_odd_headers(client: Client) -> None:
    """Send duplicate, missing, wrong and expired signatures."""
    body, headers = honest_request(client, "pull-messages").SerializeToString(), client.signed_headers()
    other = Client.signed_headers(client, offset=client.rng.choice([-4000.0, 4000.0]))
    match client.rng.randrange(5):
        case 0:
            damaged: Any = [*headers.items(), ("flwr-public-key", headers["flwr-public-key"])]
        case 1:
            damaged = {name: value for name, value in headers.items() if name != "flwr-signature"}
        case 2:
            damaged = {**headers, "flwr-signature": other["flwr-signature"]}
        case 3:
            damaged = other
        case _:
            damaged = {**headers, "content-encoding": "gzip"}
    client.post("headers", "pull-messages", body, damaged)


def send_odd_path(client: Client) -> None:
    """Request a path that is not an RPC."""
    path = client.rng.choice(
        ["..", "%2e%2e/control/start-run", "pull-messages/", "start-run", "pull-messages%3Fx", "a" * 5000, "%00"]
    )
    client.post("paths", path, b"x", method=client.rng.choice(["POST", "GET", "PUT"]))


def send_too_large(client: Client) -> None:
    """Send bodies that are too large, by their declared or their actual size."""

    def endless_body() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1 << 16)

    call = client.rng.choice([*REQUESTS])
    client.post("too large", call, bytes(6 << 20) if client.rng.random() < 0.3 else endless_body())


def leave_half_open(client: Client) -> None:
    """Open connections, send half a head or nothing, and abandon them."""
    connections = client.__dict__.setdefault("held", [])
    with contextlib.suppress(OSError):
        connection = socket.create_connection((LOOPBACK, client.port), timeout=10)
        connections.append(connection)
        if client.rng.random() < 0.7:
            connections[-1] = client.trusted.wrap_socket(connection, server_hostname=LOOPBACK)
            connections[-1].sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 9000)
    while len(connections) > 200:
        with contextlib.suppress(OSError):
            connections.pop(0).close()
    client.outcomes["half-open connection", "left"] += 1


KINDS: list[Callable[[Client], None]] = [
    *[send_malformed] * 8,
    *[send_invented_ids] * 4,
    use_other_node,
    *[send_odd_headers] * 2,
    send_odd_path,
    send_too_large,
    leave_half_open,
]


# Calls with a message


def reply_to(client: Client, request: Any, content: RecordDict | None, **changed: Any) -> Message:
    """Create a reply to a message.

    Args:
        client: sender of the reply.
        request: metadata of the message.
        content: content of the reply; None: an error that refuses the message.
        changed: overrides of the reply's metadata.
    """
    fields: dict[str, Any] = {
        "run_id": request.run_id,
        "message_id": "",
        "src_node_id": client.node,
        "dst_node_id": request.src_node_id,
        "reply_to_message_id": request.message_id,
        "group_id": request.group_id,
        "created_at": time.time(),
        "ttl": request.created_at + request.ttl - time.time() - 1,
        "message_type": request.message_type,
        **changed,
    }
    metadata = Metadata(**fields)
    error = Error(1, f"{records.REFUSED}no") if content is None else None
    reply = make_message(metadata=metadata, content=content, error=error)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


def push_head(client: Client, kind: str, reply: Message, tree: ObjectTree | None = None, times: int = 1) -> Any:
    """Send a reply's head and object tree.

    Args:
        client: sender of the reply.
        kind: kind under which the call is counted.
        reply: the reply.
        tree: object tree to announce (default: the reply's own).
        times: number of repetitions of the head in the call.

    Returns:
        The server's response; None if it rejected the call.
    """
    bare = reply if reply.has_error() else make_message(metadata=reply.metadata, content=RecordDict())
    response = client.ask(
        kind,
        "push-messages",
        messages_list=[message_to_proto(bare)] * times,
        message_object_trees=[tree or get_object_tree(reply)] * times,
        clientapp_runtime_list=[0.0],
    )
    return fleet_pb2.PushMessagesResponse.FromString(response) if response is not None else None


def send(client: Client, kind: str, reply: Message) -> None:
    """Send a complete reply, with all its objects.

    Args:
        client: sender of the reply.
        kind: kind under which the calls are counted.
        reply: the reply.
    """
    if (response := push_head(client, kind, reply)) is None:
        return
    contents = {name: item.deflate() for name, item in get_all_nested_objects(reply).items()}
    for name in response.objects_to_push:
        client.ask(
            kind,
            "push-object",
            run_id=reply.metadata.run_id,
            object_id=name,
            object_content=contents[name],
            session_id=response.session_id,
        )


def misuse(client: Client, request: Any, tree: ObjectTree) -> None:
    """Misuse a message in every way that could harm other nodes.

    Args:
        client: receiver of the message.
        request: metadata of the message.
        tree: object tree of the message.
    """
    rng, run = client.rng, request.run_id
    for _ in range(3):
        client.ask("confirmed early", "confirm-message-received", run_id=run, message_object_id=request.message_id)
    junk = RecordDict({"message": ConfigRecord({"json": "x", "sha256": "y", "version": 1})})
    reply = reply_to(client, request, junk)
    reply_tree = get_object_tree(reply)

    def extended(*more: ObjectTree) -> ObjectTree:
        return ObjectTree(object_id=reply_tree.object_id, children=[*reply_tree.children, *more])

    def leaf() -> ObjectTree:
        return ObjectTree(object_id=hashlib.sha256(rng.randbytes(8)).hexdigest())

    push_head(client, "huge tree", reply, extended(*(leaf() for _ in range(rng.choice([30, 300, 20_000])))))
    deep = leaf()
    for _ in range(rng.choice([6, 40, 90])):  # protobuf parses no deeper nesting
        deep = ObjectTree(object_id=leaf().object_id, children=[deep])
    push_head(client, "deep tree", reply, extended(deep))
    push_head(client, "contradicting tree", reply, extended(ObjectTree(object_id=reply_tree.children[0].object_id)))
    push_head(client, "two replies at once", reply, times=2)
    push_head(client, "another node's reply", reply_to(client, request, None, src_node_id=rng.getrandbits(63)))
    push_head(client, "reply to nothing", reply_to(client, request, None, reply_to_message_id=leaf().object_id))
    push_head(client, "odd times", reply_to(client, request, None, ttl=float("nan"), created_at=float("inf")))
    known = tree.children[0] if tree.children else leaf()  # an object that the server also sends to other devices
    response = push_head(client, "poisoned id", reply, extended(ObjectTree(object_id=known.object_id)))
    if response is not None:
        for name in (known.object_id, reply_tree.object_id):
            client.ask(
                "poisoned id",
                "push-object",
                run_id=run,
                object_id=name,
                object_content=rng.randbytes(100),
                session_id=response.session_id,
            )
    response = push_head(client, "promised and not sent", reply)
    if response is not None:
        size = rng.choice([10, 1 << 20, 5 << 20])
        content = b"ArrayChunk  %d\0" % size + bytes(size)
        for name in (hashlib.sha256(content).hexdigest(), reply_tree.object_id):
            client.ask(
                "objects of nothing",
                "push-object",
                run_id=run,
                object_id=name,
                object_content=content,
                session_id=response.session_id,
            )
    client.ask("another's object", "pull-object", run_id=run, object_id=leaf().object_id)


def refuse(client: Client, request: Any, tree: ObjectTree, *, hostile: bool) -> None:
    """Pull a message like a SuperNode does, and refuse it; a Query is answered.

    Args:
        client: receiver of the message.
        request: metadata of the message.
        tree: object tree of the message.
        hostile: whether to answer and confirm repeatedly.
    """
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        waiting += node.children
        while True:
            content = client.ask("taking", "pull-object", run_id=request.run_id, object_id=node.object_id)
            pulled = message_pb2.PullObjectResponse.FromString(content or b"")
            if pulled.object_available or not pulled.object_found:  # not found: an early confirmation has removed it
                break
            time.sleep(0.1)
    client.ask("taking", "confirm-message-received", run_id=request.run_id, message_object_id=request.message_id)
    query = request.message_type == records.QUERY
    reply = reply_to(client, request, records.reply_to_records(replace(REPORT, base=client.base)) if query else None)
    send(client, "answering", reply)
    if hostile:
        send(client, "answered again", reply)
        send(client, "answered otherwise", reply_to(client, request, None, created_at=request.created_at))
        client.ask(
            "confirmed again", "confirm-message-received", run_id=request.run_id, message_object_id=reply.object_id
        )


def take_part(client: Client, folder: Path, until: Callable[[], bool]) -> None:
    """Receive and answer messages like a node, until `until` returns true.

    Args:
        client: the node.
        folder: folder of the file `attack`, whose existence makes the node hostile.
        until: returns whether to stop.
    """
    beaten = 0.0
    while not until():
        if time.monotonic() - beaten > 8:
            client.ask("taking", "send-node-heartbeat", heartbeat_interval=30.0)
            beaten = time.monotonic()
        content = client.ask("taking", "pull-messages")
        pulled = fleet_pb2.PullMessagesResponse.FromString(content or b"")
        for head, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
            hostile = (folder / "attack").exists()
            if hostile:
                misuse(client, head.metadata, tree)
            refuse(client, head.metadata, tree, hostile=hostile)
        time.sleep(0.25)


def register_node(client: Client) -> None:
    """Register as a node of the federation."""
    content = None
    while content is None:
        content = client.ask("coming", "activate-node", public_key=client.pem, heartbeat_interval=30.0)
        time.sleep(0.2)
    client.node = fleet_pb2.ActivateNodeResponse.FromString(content).node_id


def flood(client: Client, calls: int, rate: float) -> None:
    """Send hostile calls at a constant rate.

    Args:
        client: sender of the calls.
        calls: number of calls.
        rate: calls per second.
    """
    started = time.monotonic()
    for number in range(calls):
        client.rng.choice(KINDS)(client)
        time.sleep(max(0.0, started + (number + 1) / rate - time.monotonic()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("mallory", "eve", "stranger"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--base", required=True, help="hash of the federation's base")
    parser.add_argument("--calls", type=int, default=0)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.nice(10)
    client = Client(args.home, args.port, Random(args.seed), own=args.role != "stranger", base=args.base)
    if args.role == "mallory":
        register_node(client)
        take_part(client, args.folder, lambda: (args.folder / "stop").exists())
        client.ask("leaving", "deactivate-node", node_id=client.node)
    else:
        while not (args.folder / "attack").exists():
            time.sleep(0.2)
        if args.role == "eve":
            register_node(client)
            client.ask("leaving", "deactivate-node", node_id=client.node)  # stays registered, but is not sampled
        flood(client, args.calls, args.rate)
    counts = [[kind, outcome, count] for (kind, outcome), count in sorted(client.outcomes.items())]
    write(args.folder / f"{args.role}.json", json.dumps(counts).encode())


if __name__ == "__main__":
    main()
