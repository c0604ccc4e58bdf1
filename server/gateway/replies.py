"""An incoming reply: its head and its object tree arrive first, then the objects one by one.

Flower stores an object tree before any object has arrived, and trusts that the children in the tree are those that the
objects name. Here a reply is assembled outside of the SuperLink, and forwarded only if it is complete and consistent:
every object has arrived, matches its hash, has a type that Anther's replies have at that position, and names the same
children as the tree.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from flwr.proto.message_pb2 import Message, ObjectTree
from google.protobuf.message import DecodeError

from server.gateway.calls import CHUNK, HEAD
from server.gateway.refusal import hostile

_KINDS = (("Message",), ("RecordDict",), ("ConfigRecord", "ArrayRecord"), ("Array",), ("ArrayChunk",))  # by depth
_DATA = len(_KINDS) - 1  # depth of the objects with an array's data
_SAME = ("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "message_type", "created_at", "ttl")
_ID = re.compile(r"[0-9a-f]{64}")
_DIVIDER = b"\0"
_WITHOUT_DATA = 8  # maximum objects of a reply besides the data of its array; Anther's replies have five
_BESIDE = 1 << 20  # maximum bytes besides the data: the JSON of a message and the objects around it
_PUSHES = 32  # pushes of one object, since connections break: each is read and hashed
_IN_MEMORY = 256 << 10  # bytes of a reply that are kept in memory, not on disk


class ReplyLimits(NamedTuple):
    """Limits on the content of one reply."""

    objects: int
    bytes: int

    @classmethod
    def of(cls, adapter: int) -> ReplyLimits:
        """Return the limits for adapters up to this size in bytes."""
        size = adapter + _BESIDE
        return cls(objects=_WITHOUT_DATA + -(-size // CHUNK), bytes=size)


class TreeObject(NamedTuple):
    """One object of a tree."""

    depth: int
    children: frozenset[str]


def tree_objects(tree: ObjectTree, max_objects: int) -> dict[str, TreeObject]:
    """List the objects that a tree names, children before their parents.

    Args:
        max_objects: maximum number of names in the tree, repetitions counted.

    Raises:
        RequestRefused: no reply of Anther has such a tree.
    """
    objects: dict[str, TreeObject] = {}
    order: list[tuple[ObjectTree, int]] = []
    waiting = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        order.append((node, depth))
        if len(order) + len(waiting) + len(node.children) > max_objects:
            raise hostile(f"a reply of more than {max_objects} objects")
        if depth == _DATA and node.children:
            raise hostile("a tree of objects that is too deep")
        waiting += [(child, depth + 1) for child in node.children]
    for node, depth in reversed(order):
        if not _ID.fullmatch(node.object_id):
            raise hostile("an object's id that isn't a hash")
        children = [child.object_id for child in node.children]
        entry = TreeObject(depth, frozenset(children))
        if len(entry.children) != len(children) or objects.setdefault(node.object_id, entry) != entry:
            raise hostile("a tree of objects that contradicts itself")
    return objects


def check_object(identifier: str, content: bytes, expected: TreeObject) -> None:
    """Check that an object matches its id and its position in the tree.

    Args:
        identifier: id of the object.
        content: received bytes.
        expected: its entry in the tree.

    Raises:
        RequestRefused: it doesn't match.
    """
    if len(content) > (CHUNK + HEAD if expected.depth == _DATA else HEAD):
        raise hostile("an object that is too large")
    if hashlib.sha256(content).hexdigest() != identifier:
        raise hostile("an object that doesn't match its hash")
    end = content.find(_DIVIDER, 0, HEAD)
    try:
        kind, children, size = content[: max(end, 0)].decode().split(" ")
    except ValueError:
        raise hostile("an object without a head") from None
    named = children.split(",") if children else []
    if kind not in _KINDS[expected.depth] or len(named) != len(set(named)) or set(named) != expected.children:
        raise hostile("an object that contradicts its tree")
    if size != str(len(content) - end - 1):
        raise hostile("an object whose length differs from its head")


def check_root(content: bytes, head: Message) -> None:
    """Refuse a reply's root object if its metadata differs from the head's: the ServerApp reads the object's."""
    try:
        body = Message.FromString(content[content.find(_DIVIDER) + 1 :])
    except DecodeError:
        raise hostile("a reply whose root isn't a message") from None
    same = all(getattr(body.metadata, name) == getattr(head.metadata, name) for name in _SAME)
    errors = [(message.HasField("error"), message.error.code, message.error.reason) for message in (body, head)]
    if not same or errors[0] != errors[1] or body.content.ByteSize():
        raise hostile("a reply whose root contradicts its head")


@dataclass
class Reply:
    """An incoming reply.

    Args:
        head: the message without its content, as it will be forwarded.
        tree: the object tree, as it will be forwarded.
        objects: the objects that the tree names, children before parents.
        bound: limits on the content.
        folder: spool folder for incoming objects.
    """

    head: Message
    tree: ObjectTree
    runtime: float
    objects: dict[str, TreeObject]
    limits: ReplyLimits
    folder: Path
    session: str = field(default_factory=lambda: secrets.token_hex(16))
    attempts: int = 0
    """Failed attempts to forward the reply."""
    size: int = 0
    last_arrival: float = field(default_factory=time.monotonic)
    """Time of the last arrival of an object."""
    _pushes: Counter[str] = field(default_factory=Counter)
    _locations: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and length, by id
    _spool: IO[bytes] | None = None

    @property
    def identifier(self) -> str:
        """The message's id, which is that of its root object."""
        return str(self.tree.object_id)

    @property
    def is_complete(self) -> bool:
        return len(self._locations) == len(self.objects)

    def add(self, identifier: str, content: bytes) -> None:
        """Add one object; if it has arrived before, it is only checked again.

        Raises:
            RequestRefused: the object doesn't belong to this reply, or doesn't match its id.
        """
        if (expected := self.objects.get(identifier)) is None:
            raise hostile("an object that doesn't belong to this reply")
        self._pushes[identifier] += 1
        if self._pushes[identifier] > _PUSHES:
            raise hostile("the same object again and again")
        check_object(identifier, content, expected)
        if expected.depth == 0:
            check_root(content, self.head)
        if identifier in self._locations:
            return
        if self.size + len(content) > self.limits.bytes:
            raise hostile(f"a reply of more than {self.limits.bytes} bytes")
        if self._spool is None:
            self._spool = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(self.folder))  # noqa: SIM115
        self._spool.seek(self.size)
        self._spool.write(content)
        self._locations[identifier] = self.size, len(content)
        self.last_arrival = time.monotonic()
        self.size += len(content)

    def content(self, identifier: str) -> bytes:
        """Return an object that has arrived."""
        offset, length = self._locations[identifier]
        assert self._spool is not None
        self._spool.seek(offset)
        return self._spool.read(length)

    def close(self) -> None:
        """Release memory and disk space."""
        if self._spool is not None:
            self._spool.close()
        self._spool = None
