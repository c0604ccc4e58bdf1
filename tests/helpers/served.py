"""Flower's own SuperLink behind a gateway, in this process, with nodes that send arbitrary calls."""

from __future__ import annotations

import base64
import functools
import time
from datetime import UTC, datetime

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.main import create_app
from starlette.testclient import TestClient

from protocol.handshake import ServerHello
from protocol.messages import NEWEST, OLDEST
from server.gateway import calls, identity
from server.gateway.app import Gateway, now
from server.gateway.device_registry import DeviceRegistry

FEDERATION = "@none/default"


def new_key(curve=ec.SECP384R1):
    return ec.generate_private_key(curve())


def openssh(key) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def pem(key) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signed(key, path: str | None = None, *, at: datetime | None = None, claimed_key=None) -> dict[str, str]:
    """Return authentication headers, signed over time and path (as our own calls) or only the time (as Flower's)."""
    moment = (at or datetime.now(UTC)).isoformat()
    text = moment if path is None else f"{moment} {path}"
    return {
        identity.KEY: base64.b64encode(pem(claimed_key or key)).decode(),
        identity.TIME: moment,
        identity.SIGNATURE: base64.b64encode(key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
    }


def hello() -> ServerHello:
    return ServerHello(
        oldest=OLDEST, newest=NEWEST, anther="1", federation="f" * 16, base="b" * 64, base_bytes=7, time=now()
    )


@functools.cache
def superlink():
    """Return the SuperLink of all tests: it takes half a second, and each test has its own run in it."""
    return create_app()


class GatewayHarness:
    """A SuperLink with one running run, a gateway in front of it, and the ServerApp's side of both.

    Args:
        folder: folder of the registry and of incoming replies.
        largest: size in bytes of the run's largest adapter.
    """

    def __init__(self, folder, *, largest: int = 64 << 20, **settings):
        self.superlink = superlink()
        self.state = self.superlink.state.linkstate_factory.state()
        self.state.object_store.clear()
        self.run = self.new_run()
        self.registry, self.seen, self.down = DeviceRegistry(folder, per_holder=99), [], False
        self.ids: dict[str, int] = {}
        self.gateway = Gateway(
            superlink_url="http://inside",
            registry=self.registry,
            hello=hello,
            authority=b"an authority",
            register_node=lambda *_: None,
            node_of=self.ids.get,
            largest=lambda: largest,
            folder=folder,
            transport=_RecordingTransport(self),
            **settings,
        )
        self.client = TestClient(self.gateway.app())

    def new_run(self) -> int:
        run = self.state.create_run("", "", "", {}, FEDERATION, None, None, TaskType.SERVER_APP)
        (task,) = self.state.get_tasks(run_ids=[run])
        assert self.state.claim_task(task.task_id)
        assert self.state.activate_task(task.task_id)
        return run

    def node(self, name: str) -> ScriptedNode:
        """Enroll and activate a node."""
        node = ScriptedNode(self, new_key())
        self.registry.enroll(self.registry.issue("ada"), node.name, name)
        self.ids[node.name] = self.state.create_node("", "", pem(node.key), 30.0)
        node.activate()
        return node

    def ask(self, node: ScriptedNode, content: RecordDict, kind: str = "train", *, pushed: bool = True) -> Message:
        """Have the ServerApp send a message to a node; with `pushed`, also its objects."""
        metadata = Metadata(
            run_id=self.run,
            message_id="",
            src_node_id=1,
            dst_node_id=node.id,
            reply_to_message_id="",
            group_id="1",
            created_at=time.time(),
            ttl=1000.0,
            message_type=kind,
        )
        message = make_message(metadata=metadata, content=content)
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        stored, missing = self.state.store_message_and_object_tree(_bare(message), get_object_tree(message), session)
        assert stored
        if pushed:
            self.push(message, missing, session)
        self._pushing = message, missing, session
        return message

    def push(self, message: Message, missing: list[str], session: str) -> None:
        """Push objects as the ServerApp does, whose run ends if this fails."""
        objects = get_all_nested_objects(message)
        for identifier in missing:
            assert self.state.store_object(self.run, session, identifier, objects[identifier].deflate())

    def push_the_rest(self) -> None:
        self.push(*self._pushing)

    def replies(self, message: Message) -> list[Message]:
        return self.state.get_message_res({message.metadata.message_id}, self.run)

    def has(self, identifier: str) -> bool:
        return identifier in self.state.object_store

    def paths(self) -> list[str]:
        """Return the paths of all calls that reached the SuperLink."""
        return [path for path, _ in self.seen]


class _RecordingTransport(httpx.ASGITransport):
    """Transport to the SuperLink that records requests."""

    def __init__(self, served: GatewayHarness):
        super().__init__(app=served.superlink)
        self.served = served

    async def handle_async_request(self, request):
        if self.served.down:
            raise httpx.ConnectError("unavailable")
        self.served.seen.append((request.url.path, dict(request.headers)))
        return await super().handle_async_request(request)


class ScriptedNode:
    """A device that makes calls of Flower's fleet protocol one by one."""

    def __init__(self, served: GatewayHarness, key):
        self.served, self.key, self.name = served, key, openssh(key)
        self.sent = None

    @property
    def id(self) -> int:
        return self.served.ids[self.name]

    def post(self, path: str, body: bytes, **headers: str):
        own = {"content-type": "application/protobuf", **signed(self.key), **headers}
        return self.served.client.post(path, content=body, headers=own)

    def call(self, call: calls.Call, **fields):
        """Make a call, and return the status with the message (for 200) or the text."""
        message = call.request(**fields)
        if hasattr(message, "node") and "node" not in fields:
            message.node.CopyFrom(ProtoNode(node_id=self.id))
        response = self.post(call.path, message.SerializeToString())
        return response.status_code, call.response.FromString(
            response.content
        ) if response.status_code == 200 else response.text

    def ok(self, call: calls.Call, **fields):
        status, message = self.call(call, **fields)
        assert status == 200, message
        return message

    def activate(self):
        return self.ok(calls.ACTIVATE, public_key=pem(self.key), heartbeat_interval=30.0)

    def pull(self):
        """Return the head of the next message and the tree of its objects."""
        pulled = self.ok(calls.PULL_MESSAGES)
        return (pulled.messages_list[0], pulled.message_object_trees[0]) if pulled.messages_list else None

    def object(self, run: int, identifier: str):
        return self.call(calls.PULL_OBJECT, run_id=run, object_id=identifier)

    def confirm(self, message: Message | ProtoMessage):
        metadata = message.metadata
        return self.call(calls.CONFIRM, run_id=metadata.run_id, message_object_id=metadata.message_id)

    def receive(self) -> ProtoMessage:
        """Pull a message with all of its objects, as an honest node does."""
        head, tree = self.pull()
        for identifier in names(tree):
            status, response = self.object(head.metadata.run_id, identifier)
            assert (status, response.object_available) == (200, True)
        assert self.confirm(head)[0] == 200
        return head

    def reply(self, to: ProtoMessage, content: RecordDict | None = None, **changed) -> Message:
        """Make a reply; `changed` overrides fields of its metadata."""
        request = to.metadata
        fields = {
            "run_id": request.run_id,
            "message_id": "",
            "src_node_id": self.id,
            "dst_node_id": request.src_node_id,
            "reply_to_message_id": request.message_id,
            "group_id": request.group_id,
            "created_at": time.time(),
            "ttl": request.ttl - 10,
            "message_type": request.message_type,
            **changed,
        }
        metadata = Metadata(**fields)
        body = {"error": Error(1, "refused: no")} if content is None else {"content": content}
        message = make_message(metadata=metadata, **body)
        message.metadata.__dict__["_message_id"] = message.object_id
        return message

    def promise(self, reply: Message, tree: ObjectTree | None = None, **changed):
        """Send a reply's head and the tree of its objects."""
        fields = {
            "messages_list": [message_to_proto(_bare(reply))],
            "message_object_trees": [tree or get_object_tree(reply)],
            "clientapp_runtime_list": [1.0],
            **changed,
        }
        return self.call(calls.PUSH_MESSAGES, **fields)

    def push_object(self, run: int, session: str, identifier: str, content: bytes):
        return self.call(
            calls.PUSH_OBJECT, run_id=run, session_id=session, object_id=identifier, object_content=content
        )

    def send(self, reply: Message) -> list[int]:
        """Send a complete reply, as an honest node does, and return the statuses of all calls."""
        status, response = self.promise(reply)
        if status != 200:
            return [status]
        objects, run = get_all_nested_objects(reply), reply.metadata.run_id
        return [
            status,
            *(
                self.push_object(run, response.session_id, name, objects[name].deflate())[0]
                for name in response.objects_to_push
            ),
        ]


def records(size: int = 100, *, text: str = "{}") -> RecordDict:
    """Make the contents of a message with an adapter of this many bytes."""
    data = bytes(number % 251 for number in range(size))
    arrays = ArrayRecord({"adapter": Array(dtype="uint8", shape=(size,), stype="safetensors", data=data)})
    return RecordDict({"message": ConfigRecord({"json": text}), "arrays": arrays})


def names(tree: ObjectTree) -> list[str]:
    """List all ids of a tree, children first."""
    return [name for child in tree.children for name in names(child)] + [tree.object_id]


def _bare(message: Message) -> Message:
    return message if message.has_error() else make_message(metadata=message.metadata, content=RecordDict())
