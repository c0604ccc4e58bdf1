"""Messages as Flower's records: the JSON in a ConfigRecord, an adapter as the one Array of an ArrayRecord.

The adapter's bytes stay those of `protocol.codec`; Flower cuts the Array into chunks and never parses it.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from conf.errors import AntherError
from protocol import messages
from protocol.messages import Reply, Request

QUERY, TRAIN, EVALUATE, PERSONALISE = "query", "train", "evaluate", "train.personalise"

_MESSAGE, _ARRAYS, _ADAPTER, _STYPE = "message", "arrays", "adapter", "safetensors"


class _Exchange(NamedTuple):
    request: Any
    reply: Any


_EXCHANGES = {
    QUERY: _Exchange(messages.Query, messages.DeviceReport),
    TRAIN: _Exchange(messages.Train, messages.Update),
    EVALUATE: _Exchange(messages.Evaluate, messages.Evaluation),
    PERSONALISE: _Exchange(messages.Personalise, messages.Personalised),
}


def message_type(request: Request) -> str:
    """Flower's message type for a request, which routes it to the function of the ClientApp."""
    return next(name for name, exchange in _EXCHANGES.items() if isinstance(request, exchange.request))


def request_to_records(request: Request) -> RecordDict:
    beside = messages.payloads(request)
    bare: Any = dict.fromkeys(beside, b"")
    config = _request_config(dataclasses.replace(request, **bare))
    return _records(config, _sent_adapter(beside[_ADAPTER]) if beside else None)


def request_from_records(message_type: str, records: RecordDict) -> Request:
    """The request in a message of this type; AntherError with one line if it is malformed."""
    return _message(_exchange(message_type).request, *_contents(records))


def reply_to_records(reply: Reply) -> RecordDict:
    beside = messages.payloads(reply)
    return _records(_config(reply), adapter_to_record(beside[_ADAPTER]) if beside else None)


def reply_from_records(message_type: str, records: RecordDict) -> Reply:
    """The reply to a message of this type; AntherError with one line if it is malformed."""
    return _message(_exchange(message_type).reply, *_contents(records))


def adapter_to_record(adapter: bytes) -> ArrayRecord:
    """An adapter of `protocol.codec` as Flower holds global arrays: one Array of bytes."""
    return ArrayRecord({_ADAPTER: Array(dtype="uint8", shape=(len(adapter),), stype=_STYPE, data=adapter)})


def adapter_from_record(record: ArrayRecord) -> bytes:
    """Inverse of `adapter_to_record`; AntherError if the record holds anything else."""
    if list(record) != [_ADAPTER] or record[_ADAPTER].stype != _STYPE:
        raise AntherError(f"arrays must hold one {_STYPE} entry named {_ADAPTER!r}, hold {sorted(record)[:5]}")
    return record[_ADAPTER].data


def _exchange(message_type: str) -> _Exchange:
    if message_type not in _EXCHANGES:
        raise AntherError(f"{message_type[:100]!r}: no such message type; known are {', '.join(_EXCHANGES)}")
    return _EXCHANGES[message_type]


def _records(config: ConfigRecord, adapter: ArrayRecord | None) -> RecordDict:
    return RecordDict({_MESSAGE: config} if adapter is None else {_MESSAGE: config, _ARRAYS: adapter})


def _config(message: Request | Reply) -> ConfigRecord:
    return ConfigRecord({"json": messages.to_json(message)})


def _contents(records: RecordDict) -> tuple[str | None, bytes | None]:
    """The JSON and the adapter of a message; None for what is not there."""
    config, arrays = records.get(_MESSAGE), records.get(_ARRAYS)
    text = config.get("json") if isinstance(config, ConfigRecord) else None
    adapter = adapter_from_record(arrays) if isinstance(arrays, ArrayRecord) else None
    return text if isinstance(text, str) else None, adapter


def _message(kind: Any, text: str | None, adapter: bytes | None) -> Any:
    if text is None:
        raise AntherError(f"malformed message: a {kind.__name__} travels as JSON in the record {_MESSAGE!r}")
    return messages.from_json(kind, text, **({} if adapter is None else {_ADAPTER: adapter}))


@lru_cache(maxsize=64)
def _request_config(request: Request) -> ConfigRecord:
    """Of a request without its adapter: made once for the hundreds of devices that are asked for the same."""
    return _config(request)


@lru_cache(maxsize=2)
def _sent_adapter(adapter: bytes) -> ArrayRecord:
    """One for all that are sent the same adapter."""
    return adapter_to_record(adapter)
