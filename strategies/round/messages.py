"""Requests as Flower messages, and the replies in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from flwr.app import Message

from protocol import records
from protocol.messages import Reply, Request
from strategies.round.validation import ReceivedReply, error_rejection


def to_messages(requests: Mapping[int, Request]) -> list[Message]:
    """Make one Flower message for each request, by node."""
    return [
        Message(records.request_to_records(request), node, records.message_type(request))
        for node, request in requests.items()
    ]


def received_replies(kind: str, replies: Iterable[Message], *, max_bytes: int = 0) -> Iterator[ReceivedReply]:
    """Yield the source and a decoder of each message.

    Args:
        kind: message type of the requests.
        replies: replies in the order of arrival.
        max_bytes: maximum bytes of an adapter to read.
    """
    for message in replies:
        error = message.error if message.has_error() else None
        read = error_rejection(error.code, error.reason) if error else partial(_read, kind, message, max_bytes)
        yield message.metadata.src_node_id, read


def _read(kind: str, message: Message, max_bytes: int) -> Reply:
    return records.reply_from_records(kind, message.content, max_bytes=max_bytes)
