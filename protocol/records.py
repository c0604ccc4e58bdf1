"""Messages as Flower records: the JSON in a ConfigRecord, an adapter as the only Array of an ArrayRecord.

The adapter's bytes are those of `protocol.tensor_codec`; Flower splits the Array into chunks and never parses it. A
SHA-256 of both is sent with the JSON and compared before either is parsed: Flower names objects by their hash, but a
receiver doesn't compare it. The checksum detects damage; the sender is authenticated by Flower's node authentication.
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
"""Prefix of an error reply's reason if the device refused on purpose, without a failure."""

UNREADABLE = 1000
"""Error code of a reply that Flower could not unpack; Flower's own codes are far below."""

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
    """Return Flower's message type for a request, which selects the function of the ClientApp."""
    return next(name for name, exchange in _EXCHANGES.items() if isinstance(request, exchange.request))


def request_to_records(request: Request) -> RecordDict:
    """Encode a request."""
    adapter = messages.payloads(request).get(_ADAPTER)
    if adapter is None:
        return _records(_text(request), None, None)
    bare: Any = {_ADAPTER: b""}
    return _records(_text(dataclasses.replace(request, **bare)), adapter, _sent_adapter(adapter))


def request_from_records(message_type: str, records: RecordDict, *, max_bytes: int | None = None) -> Request:
    """Decode a request; AntherError with one line if it is malformed.

    Args:
        message_type: Flower's message type.
        records: the message's content.
        max_bytes: maximum number of bytes of an adapter. None: no limit.
    """
    return _message(_exchange(message_type).request, *_contents(records, max_bytes))


def reply_to_records(reply: Reply) -> RecordDict:
    """Encode a reply."""
    adapter = messages.payloads(reply).get(_ADAPTER)
    return _records(messages.to_json(reply), adapter, None if adapter is None else adapter_to_record(adapter))


def reply_from_records(message_type: str, records: RecordDict, *, max_bytes: int | None = None) -> Reply:
    """Decode a reply; AntherError with one line if it is malformed.

    Args:
        message_type: Flower's message type of the request.
        records: the message's content.
        max_bytes: maximum number of bytes of an adapter. None: no limit.
    """
    return _message(_exchange(message_type).reply, *_contents(records, max_bytes))


def adapter_to_record(adapter: bytes) -> ArrayRecord:
    """Wrap an adapter of `protocol.tensor_codec` in the form of Flower's global arrays: one Array of bytes."""
    return ArrayRecord({_ADAPTER: Array(dtype=_DTYPE, shape=(len(adapter),), stype=_STYPE, data=adapter)})


def adapter_from_record(record: ArrayRecord) -> bytes:
    """Unwrap an adapter (inverse of `adapter_to_record`); AntherError if the record has another content or shape."""
    if list(record) != [_ADAPTER] or record[_ADAPTER].stype != _STYPE:
        raise AntherError(
            f"arrays must contain only one {_STYPE} entry named {_ADAPTER!r}, not these {len(record)} entries"
        )
    array = record[_ADAPTER]
    if (array.dtype, array.shape) != (_DTYPE, (len(array.data),)):
        raise AntherError(f"arrays: dtype or shape of {_ADAPTER!r} don't match its {len(array.data)} bytes")
    return array.data


def _exchange(message_type: str) -> _Exchange:
    if message_type not in _EXCHANGES:
        raise AntherError(f"{message_type[:100]!r}: no such message type; known are {', '.join(_EXCHANGES)}")
    return _EXCHANGES[message_type]


def _records(text: str, adapter: bytes | None, arrays: ArrayRecord | None) -> RecordDict:
    config = ConfigRecord({_JSON: text, _SHA256: _checksum(text, adapter), _VERSION: messages.NEWEST})
    return RecordDict({_MESSAGE: config} if arrays is None else {_MESSAGE: config, _ARRAYS: arrays})


def _contents(records: RecordDict, max_bytes: int | None) -> tuple[str, bytes | None]:
    """Return the JSON and the adapter of a message, after all checks; cheap ones come first."""
    names = set(records) if isinstance(records, RecordDict) else set()
    config, arrays = (records[name] if name in names else None for name in (_MESSAGE, _ARRAYS))
    if isinstance(config, ConfigRecord) and _VERSION in config:
        _check_version(config[_VERSION])  # first, since other versions may have other content
    expected = {_JSON, _SHA256, _VERSION}
    if not isinstance(config, ConfigRecord) or set(config) != expected or names - {_MESSAGE, _ARRAYS}:
        listed = f"{_JSON}, {_SHA256} and {_VERSION}"
        raise AntherError(f"malformed message: must contain exactly {listed} in {_MESSAGE!r}, and at most one adapter")
    text, checksum = config[_JSON], config[_SHA256]
    if not isinstance(text, str) or len(text) > messages.MAX_JSON_CHARS:
        raise AntherError(f"malformed message: the JSON is not a text of at most {messages.MAX_JSON_CHARS} characters")
    adapter = None
    if arrays is not None:
        if not isinstance(arrays, ArrayRecord):
            raise AntherError(
                f"malformed message: an adapter must be sent in an ArrayRecord, not a {type(arrays).__name__}"
            )
        adapter = adapter_from_record(arrays)
        if max_bytes is not None and len(adapter) > max_bytes:
            raise AntherError(f"malformed message: an adapter of {len(adapter)} bytes, the maximum is {max_bytes}")
    if checksum != _checksum(text, adapter):
        raise AntherError("malformed message: damaged in transit, the checksum doesn't match")
    return text, adapter


def _check_version(version_number: object) -> None:
    """Raise AntherError that says which side has to update."""
    if not isinstance(version_number, int) or isinstance(version_number, bool):
        raise AntherError(f"malformed message: its {_VERSION} is not a whole number")
    if not messages.OLDEST <= version_number <= messages.NEWEST:
        outdated = "the receiver" if version_number > messages.NEWEST else "the sender"
        supported = f"{messages.OLDEST} to {messages.NEWEST}"
        raise AntherError(
            f"message of protocol {version_number}, supported: {supported}: {outdated} has to update Anther"
        )


def _message(kind: Any, text: str, adapter: bytes | None) -> Any:
    return messages.from_json(kind, text, **({} if adapter is None else {_ADAPTER: adapter}))


def _checksum(text: str, adapter: bytes | None) -> str:
    adapter_digest = b"" if adapter is None else _sha256(adapter)
    return hashlib.sha256(text.encode(errors="surrogatepass") + adapter_digest).hexdigest()


_hashed: deque[tuple[bytes, bytes]] = deque(maxlen=4)


def _sha256(adapter: bytes) -> bytes:
    """Return the SHA-256 of an adapter, cached for simulated devices of one process that receive the same adapter.

    The cache compares object identity: comparing content would cost as much as hashing it again.
    """
    for known, digest in tuple(_hashed):
        if known is adapter:
            return digest
    digest = hashlib.sha256(adapter).digest()
    _hashed.append((adapter, digest))
    return digest


@lru_cache(maxsize=64)
def _text(request: Request) -> str:
    """Return the JSON of a request without its adapter, cached for the devices that receive the same request."""
    return messages.to_json(request)


@lru_cache(maxsize=2)
def _sent_adapter(adapter: bytes) -> ArrayRecord:
    """Return the record of an adapter, cached for the devices that receive the same adapter."""
    return adapter_to_record(adapter)
