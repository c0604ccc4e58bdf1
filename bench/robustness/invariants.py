"""Invariants of every accepted message, stated independently of the code under test.

Nothing here imports `protocol`, `strategies` or `client`: records are read only with json, struct and numpy, and the
product B A is formed, which the validating code avoids.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

MAX_NORM, MAX_NUMBER, MAX_COUNT, MAX_TEXT = 100.0, 1e12, 2**31 - 1, 200
MAX_JSON = 65_536

Check = Callable[[Any], bool]
Matrices = dict[str, NDArray[np.float32]]


def _text(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_TEXT and all(c == " " or c.isprintable() for c in value)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= MAX_NUMBER


def _signed(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_NUMBER <= value <= MAX_NUMBER


def _flag(value: Any) -> bool:
    return type(value) is bool


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _quality(value: Any) -> bool:
    return value in ("measured", "estimate")


def _trains(value: Any) -> bool:
    return value in ("both", "a", "b", "cores", "split")


def _texts(value: Any) -> bool:
    return type(value) is list and all(map(_text, value))


def _precision(value: Any) -> bool:
    return value in ("fp32", "fp16", "int8", "int4")


def _object(**fields: Check) -> Check:
    return lambda value: (
        type(value) is dict and value.keys() == fields.keys() and all(fields[k](v) for k, v in value.items())
    )


def _optimizer(value: Any) -> bool:
    return value in ("adamw", "sgd")


_EXAMPLE = _object(noise_multiplier=_amount, clip=_amount, sampling_rate=_amount, draws=_count, delta=_amount)
_MEASURING = _object(noise_multiplier=_amount, clip=_amount, pictures=_count, delta=_amount)
_METHOD = _object(
    name=_text,
    options=lambda value: type(value) is list and all(map(_object(name=_text, value=_amount), value)),
)
_PLAN = _object(
    run=_text,
    round=_count,
    base=_text,
    rank=_count,
    steps=_count,
    batch_size=_count,
    learning_rate=_amount,
    optimiser=_optimizer,
    proximal=_amount,
    scaffold=_flag,
    trains=_trains,
    sites=_or_none(_texts),
    personalization=_or_none(_METHOD),
    privacy=_or_none(_EXAMPLE),
    update=_precision,
    keep=_amount,
    feedback=_flag,
)
_QUANTIZED = _object(precision=lambda value: value != "fp32" and _precision(value), rank=_count)
MESSAGES: Mapping[str, Check] = {
    "DeviceReport": _object(
        device=_text,
        base=_text,
        profile=_text,
        memory_gib=_amount,
        examples_per_second=_amount,
        watts=_amount,
        uplink_mbps=_amount,
        downlink_mbps=_amount,
        metered=_flag,
        battery=_or_none(_amount),
        battery_wh=_or_none(_amount),
        charging=_flag,
        busy=_flag,
        hot=_flag,
        rank=_or_none(_count),
        sites=_or_none(_texts),
        pictures=_flag,
    ),
    "Update": _object(
        device=_text,
        run=_text,
        round=_count,
        rank=_count,
        release=_flag,
        seconds=_amount,
        joules=_amount,
        quality=_quality,
        loss=_or_none(_amount),
        epsilon=_or_none(_amount),
        events=_count,
    ),
    "Evaluation": _object(
        device=_text,
        round=_count,
        base=_or_none(_amount),
        shared=_or_none(_amount),
        gain=_or_none(_signed),
        release=_flag,
        epsilon=_or_none(_amount),
    ),
    "Personalized": _object(device=_text, seconds=_amount, joules=_amount, quality=_quality),
    "Query": _object(adapted=_or_none(_texts)),
    "Train": _object(plan=_PLAN, rounded=_or_none(_QUANTIZED), adapted=_or_none(_texts), echo=_count),
    "Evaluate": _object(
        run=_text,
        round=_count,
        rounded=_or_none(_QUANTIZED),
        adapted=_or_none(_texts),
        timesteps=_count,
        privacy=_or_none(_MEASURING),
    ),
    "Personalize": _object(
        run=_text,
        round=_count,
        rank=_count,
        steps=_count,
        batch_size=_count,
        learning_rate=_amount,
        look_every=_count,
        patience=_count,
        rounded=_or_none(_QUANTIZED),
        adapted=_or_none(_texts),
        timesteps=_count,
        method=_METHOD,
    ),
}
CARRYING = {"Update", "Train", "Evaluate", "Personalize"}
"""Messages that carry an adapter."""


class ExpectedMessage(NamedTuple):
    """Properties that the receiver expects of a message."""

    message: str
    """Name of the message type."""
    sites: Mapping[str, tuple[int, int]]
    """(inputs, outputs) of each site."""
    max_rank: int
    exact: Mapping[str, Any]
    """Required values of message fields; `rank` is also the required rank of the adapter."""


def violations(records: object, expected: ExpectedMessage) -> list[str]:
    """List the invariants that a message violates; empty for a message that may be accepted."""
    return list(_violations(records, expected))


def adapter_violations(data: bytes, expected: ExpectedMessage) -> list[str]:
    """List the invariants that the bytes of an adapter violate."""
    return list(_of_adapter(data, expected))


def _violations(records: object, expected: ExpectedMessage) -> Iterator[str]:
    carries = expected.message in CARRYING
    if not isinstance(records, RecordDict) or sorted(records) != (["arrays", "message"] if carries else ["message"]):
        yield "unexpected records"
        return
    config, arrays = records["message"], records.get("arrays")
    named = ["json", "sha256", "version"]
    if not isinstance(config, ConfigRecord) or sorted(config) != named or type(config["json"]) is not str:
        yield "the JSON or its checksum is missing or of another type"
        return
    text, data = config["json"], b""
    if carries:
        if not isinstance(arrays, ArrayRecord) or list(arrays) != ["adapter"]:
            yield "the adapter's record is missing or of another type"
            return
        array = arrays["adapter"]
        data = array.data
        if (array.stype, array.dtype, array.shape) != ("safetensors", "uint8", (len(data),)):
            yield "the array's type or shape is wrong"
    digest = hashlib.sha256(data).digest() if carries else b""
    if config["sha256"] != hashlib.sha256(text.encode("utf-8", "surrogatepass") + digest).hexdigest():
        yield "damaged in transit"
    yield from _of_text(text, expected)
    if carries:
        yield from _of_adapter(data, expected)


def _of_text(text: str, expected: ExpectedMessage) -> Iterator[str]:
    if len(text) > MAX_JSON:
        yield "JSON too long"
        return
    try:
        fields = _unique_json(text)
    except (ValueError, RecursionError):
        yield "not JSON with unique keys"
        return
    if not MESSAGES[expected.message](fields):
        yield "a field is missing, unknown, of another type or out of range"
        return
    for name, value in expected.exact.items():
        *path, last = name.split(".")
        node = fields
        for step in path:
            node = node[step]
        if node[last] != value:
            yield f"{name} is not the requested value"


def _of_adapter(data: bytes, expected: ExpectedMessage) -> Iterator[str]:
    try:
        tensors = parse(data)
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        yield f"not valid safetensors: {error}"
        return
    names = {f"{site}.{factor}" for site in expected.sites for factor in ("lora_A", "lora_B")}
    if tensors.keys() != names:
        yield "other tensors than those of the sites"
        return
    ranks = set()
    for site, (inputs, outputs) in expected.sites.items():
        a, b = tensors[f"{site}.lora_A"], tensors[f"{site}.lora_B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inputs or b.shape[0] != outputs:
            yield f"{site}: wrong shapes"
            return
        ranks |= {a.shape[0], b.shape[1]}
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            yield f"{site}: not finite"
            return
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        if max(np.linalg.norm(a64), np.linalg.norm(b64), np.linalg.norm(b64 @ a64)) > MAX_NORM * (1 + 1e-9):
            yield f"{site}: norm over {MAX_NORM:g}"
    if len(ranks) != 1 or not 1 <= min(ranks) <= expected.max_rank:
        yield "more than one rank, or a rank that is not allowed"
    if "rank" in expected.exact and ranks != {expected.exact["rank"]}:
        yield "another rank than the requested one"


def parse(data: bytes) -> Matrices:
    """Parse safetensors bytes of float32 tensors without gaps; raises ValueError for any other bytes."""
    (length,) = struct.unpack_from("<Q", data)
    if length > len(data) - 8 or length > 2**20:
        raise ValueError("header")
    header = _unique_json(data[8 : 8 + length].decode())
    position, tensors = 0, {}
    body = data[8 + length :]
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if sorted(entry) != ["data_offsets", "dtype", "shape"] or entry["dtype"] != "F32":
            raise ValueError(f"entry of {name[:50]!r}")
        if any(type(n) is not int or n < 0 for n in entry["shape"] + entry["data_offsets"]):
            raise ValueError("a number")
        end = position + 4 * math.prod(entry["shape"])
        if entry["data_offsets"] != [position, end] or end > len(body):
            raise ValueError("offsets")
        tensors[name] = np.frombuffer(body[position:end], "<f4").reshape(entry["shape"])
        position = end
    if position != len(body):
        raise ValueError("length")
    return tensors


def _unique_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("duplicate key")
        return dict(pairs)

    result = json.loads(text, object_pairs_hook=unique)
    json.dumps(result, allow_nan=False)  # NaN and infinity are not valid JSON
    return result
