"""Messages as Flower's records: the JSON in a ConfigRecord, an adapter as the one Array of an ArrayRecord.

The adapter's bytes stay those of `protocol.tensor_codec`; Flower cuts the Array into chunks and never parses it. A SHA-256 of
both travels beside the JSON and is compared before either is parsed: Flower names objects by their hash, but whoever
pulls one doesn't compare. It finds damage; who sent a message is for Flower's authentication of nodes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from functools import lru_cache
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.errors import AntherError
from protocol import messages
from protocol.messages import Reply, Request

QUERY, TRAIN, EVALUATE, PERSONALIZE = "query", "train", "evaluate", "train.personalise"

REFUSED = "refused: "
"""How the reason of an error reply begins if it is a device's no, and nothing went wrong."""

UNREADABLE = 1000
"""Error code of a reply that Flower itself could not unpack; Flower's own lie far below."""

_MESSAGE, _ARRAYS, _ADAPTER, _STYPE, _DTYPE = "message", "arrays", "adapter", "safetensors", "uint8"
_JSON, _SHA256, _VERSION = "json", "sha256", "version"


class _Exchange(NamedTuple):
    request: Any
    reply: Any


_EXCHANGES = {
    QUERY: _Exchange(messages.Query, messages.DeviceReport),
    TRAIN: _Exchange(messages.Train, messages.Update),
    EVALUATE: _Exchange(messages.Evaluate, messages.Evaluation),
    PERSONALIZE: _Exchange(messages.Personalize, messages.Personalized),
}


def message_type(request: Request) -> str:
    """Flower's message type for a request, which routes it to the function of the ClientApp."""
    return next(name for name, exchange in _EXCHANGES.items() if isinstance(request, exchange.request))


def request_to_records(request: Request) -> RecordDict:
    adapter = messages.payloads(request).get(_ADAPTER)
    if adapter is None:
        return _records(_text(request), None, None)
    bare: Any = {_ADAPTER: b""}
    return _records(_text(dataclasses.replace(request, **bare)), adapter, _sent_adapter(adapter))


def request_from_records(message_type: str, records: RecordDict, *, most: int | None = None) -> Request:
    """The request in a message of this type; AntherError with one line if it is malformed.

    Args:
        most: bytes of an adapter that are looked at; None: whatever has come.
    """
    return _message(_exchange(message_type).request, *_contents(records, most))


def reply_to_records(reply: Reply) -> RecordDict:
    adapter = messages.payloads(reply).get(_ADAPTER)
    return _records(messages.to_json(reply), adapter, None if adapter is None else adapter_to_record(adapter))


def reply_from_records(message_type: str, records: RecordDict, *, most: int | None = None) -> Reply:
    """The reply to a message of this type; AntherError and `most` as for a request."""
    return _message(_exchange(message_type).reply, *_contents(records, most))


def adapter_to_record(adapter: bytes) -> ArrayRecord:
    """An adapter of `protocol.tensor_codec` as Flower holds global arrays: one Array of bytes."""
    return ArrayRecord({_ADAPTER: Array(dtype=_DTYPE, shape=(len(adapter),), stype=_STYPE, data=adapter)})


def adapter_from_record(record: ArrayRecord) -> bytes:
    """Inverse of `adapter_to_record`; AntherError if the record holds anything else, or other than it claims."""
    if list(record) != [_ADAPTER] or record[_ADAPTER].stype != _STYPE:
        raise AntherError(f"arrays must hold one {_STYPE} entry named {_ADAPTER!r} and hold {len(record)} entries")
    array = record[_ADAPTER]
    if (array.dtype, array.shape) != (_DTYPE, (len(array.data),)):
        raise AntherError(f"arrays: {_ADAPTER!r} claims another dtype or shape than its {len(array.data)} bytes have")
    return array.data


def _exchange(message_type: str) -> _Exchange:
    if message_type not in _EXCHANGES:
        raise AntherError(f"{message_type[:100]!r}: no such message type; known are {', '.join(_EXCHANGES)}")
    return _EXCHANGES[message_type]


def _records(text: str, adapter: bytes | None, arrays: ArrayRecord | None) -> RecordDict:
    config = ConfigRecord({_JSON: text, _SHA256: _checksum(text, adapter), _VERSION: messages.NEWEST})
    return RecordDict({_MESSAGE: config} if arrays is None else {_MESSAGE: config, _ARRAYS: arrays})


def _contents(records: RecordDict, most: int | None) -> tuple[str, bytes | None]:
    """The JSON and the adapter of a message, as they were sent; what is cheap to find is found first."""
    names = set(records) if isinstance(records, RecordDict) else set()
    config, arrays = (records[name] if name in names else None for name in (_MESSAGE, _ARRAYS))
    if isinstance(config, ConfigRecord) and _VERSION in config:
        _check_version(config[_VERSION])  # first of all: another version may hold whatever it likes
    expected = {_JSON, _SHA256, _VERSION}
    if not isinstance(config, ConfigRecord) or set(config) != expected or names - {_MESSAGE, _ARRAYS}:
        listed = f"{_JSON}, {_SHA256} and {_VERSION}"
        raise AntherError(f"malformed message: must hold {listed} in {_MESSAGE!r}, an adapter, no more")
    text, checksum = config[_JSON], config[_SHA256]
    if not isinstance(text, str) or len(text) > messages.MAX_JSON_CHARS:
        raise AntherError(f"malformed message: the JSON is not a text of at most {messages.MAX_JSON_CHARS} characters")
    adapter = None
    if arrays is not None:
        if not isinstance(arrays, ArrayRecord):
            raise AntherError(f"malformed message: an adapter travels in an ArrayRecord, not a {type(arrays).__name__}")
        adapter = adapter_from_record(arrays)
        if most is not None and len(adapter) > most:
            raise AntherError(f"malformed message: an adapter of {len(adapter)} bytes, where {most} are the most")
    if checksum != _checksum(text, adapter):
        raise AntherError("malformed message: damaged in transit, its checksum is another")
    return text, adapter


def _check_version(found: object) -> None:
    """AntherError that says who has to update."""
    if not isinstance(found, int) or isinstance(found, bool):
        raise AntherError(f"malformed message: its {_VERSION} is not a whole number")
    if not messages.OLDEST <= found <= messages.NEWEST:
        behind = "whoever reads it" if found > messages.NEWEST else "whoever wrote it"
        spoken = f"{messages.OLDEST} to {messages.NEWEST}"
        raise AntherError(f"a message of protocol {found}, and {spoken} is spoken here: {behind} has to update Anther")


def _message(kind: Any, text: str, adapter: bytes | None) -> Any:
    return messages.from_json(kind, text, **({} if adapter is None else {_ADAPTER: adapter}))


def _checksum(text: str, adapter: bytes | None) -> str:
    beside = b"" if adapter is None else _sha256(adapter)
    return hashlib.sha256(text.encode(errors="surrogatepass") + beside).hexdigest()


_hashed: deque[tuple[bytes, bytes]] = deque(maxlen=4)


def _sha256(adapter: bytes) -> bytes:
    """Kept for the many simulated devices of one process that are sent the same; known by the object, since to look
    it up by its content would cost as much again.
    """
    for known, digest in tuple(_hashed):
        if known is adapter:
            return digest
    digest = hashlib.sha256(adapter).digest()
    _hashed.append((adapter, digest))
    return digest


@lru_cache(maxsize=64)
def _text(request: Request) -> str:
    """Of a request without its adapter: made once for the hundreds of devices that are asked for the same."""
    return messages.to_json(request)


@lru_cache(maxsize=2)
def _sent_adapter(adapter: bytes) -> ArrayRecord:
    """One for all that are sent the same adapter."""
    return adapter_to_record(adapter)
