"""Malicious messages: a named corpus, and structure-aware mutations of honest messages.

An attacker can compute checksums, so all messages have a correct one, except for some that represent damage in transit.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from random import Random
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from protocol.messages import MAX_JSON_CHARS, NEWEST

Header = dict[str, dict[str, Any]]
Delivery = Callable[[], Message]

HUGE = 10**4000
NESTED = "[" * 900 + "]" * 900
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    2**31,
    2**63,
    HUGE,
    -0.5,
    1e-320,
    1e13,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x" * 201,
    "two\nlines",
    "\x1b[2J",
    "\ud800",
    "../../etc/passwd",
    [],
    [[]],
    {},
    {"a": {}},
    [0] * 5000,
)


class WireMessage(NamedTuple):
    """An honest message's JSON text and adapter bytes."""

    text: str
    adapter: bytes | None


class MessageAttack(NamedTuple):
    """A message to deliver in place of an honest one."""

    kind: str
    """Class of the attack, under which it is counted."""
    prepare: Callable[[Message], Delivery]
    """Function from the request, or a message to send, to a function that creates the receiver's copy."""
    payload: bytes | None = None
    """Bytes of the adapter, for a peer that reads only adapters."""


def to_records(message: WireMessage, checksum: str | None = None) -> RecordDict:
    """Convert a message to Flower's records, with its own or another checksum."""
    beside = b"" if message.adapter is None else hashlib.sha256(message.adapter).digest()
    checksum_of_content = hashlib.sha256(message.text.encode("utf-8", "surrogatepass") + beside).hexdigest()
    fields: dict[str, Any] = {"json": message.text, "sha256": checksum or checksum_of_content, "version": NEWEST}
    records = RecordDict({"message": ConfigRecord(fields)})
    if message.adapter is not None:
        array = Array("uint8", (len(message.adapter),), "safetensors", message.adapter)
        records["arrays"] = ArrayRecord({"adapter": array})
    return records


def records_attack(kind: str, records: RecordDict, payload: bytes | None = None) -> MessageAttack:
    """Return the attack that delivers these records as content of a reply or request.

    Args:
        kind: class of the attack.
        records: content of the message.
        payload: bytes of the adapter.
    """
    return MessageAttack(kind, lambda message: lambda: _with_content(message, records), payload)


def _with_content(message: Message, records: RecordDict) -> Message:
    """Make a reply to a server's message, or the same request with other content."""
    metadata = message.metadata
    if metadata.message_id:
        return Message(records, reply_to=message)
    return Message(records, metadata.dst_node_id, metadata.message_type)


# Adapters: safetensors bytes


def unpack_safetensors(data: bytes) -> tuple[Header, bytes]:
    """Split honest bytes into header and data."""
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def pack_safetensors(header: object, data: bytes) -> bytes:
    """Make safetensors bytes from any header, an object or JSON text, with the format's padding."""
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def replace_values(honest: bytes, value: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """Replace the values of all tensors."""
    header, data = unpack_safetensors(honest)
    return pack_safetensors(header, value(np.frombuffer(data, "<f4").copy()).astype("<f4").tobytes())


def _put(index: int, number: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[index] = number
        return values

    return change


def adapter_attacks(honest: bytes, *, empty: int) -> Iterator[tuple[str, bytes]]:
    """Yield malicious adapters with the name of their class; `empty` is the number of tensors of the empty ones."""
    header, data = unpack_safetensors(honest)
    name, entry = next(iter(header.items()))
    other, another = list(header.items())[-1]
    text = json.dumps(header)

    def with_entry(**changes: Any) -> bytes:
        return pack_safetensors(header | {name: entry | changes}, data)

    start, end = entry["data_offsets"]
    nothing = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
    yield "empty tensors", pack_safetensors("{" + ",".join(f'"{i}":{{{nothing}}}' for i in range(empty)) + "}", b"")
    yield "duplicate key", pack_safetensors(text[:-1] + f', "{name}": {json.dumps(entry)}}}', data)
    yield "duplicate key", pack_safetensors(text.replace('"dtype"', '"dtype": "F64", "dtype"', 1), data)
    yield "deep shape", with_entry(shape=[1] * 10_000 + entry["shape"])
    yield "deep shape", pack_safetensors(text.replace(json.dumps(entry["shape"]), NESTED, 1), data)
    yield "deep nesting", pack_safetensors("[" * 60_000, data)
    yield "deep nesting", pack_safetensors('{"a":' * 10_000, data)
    yield "deep nesting", pack_safetensors(text.replace('"F32"', NESTED, 1), data)
    yield "NaN or infinite", replace_values(honest, _put(0, float("nan")))
    yield "NaN or infinite", replace_values(honest, _put(-1, float("-inf")))
    yield "NaN or infinite", pack_safetensors(text.replace(str(end), "NaN", 1), data)
    yield "wrong dtype", with_entry(dtype="F64")
    yield "wrong dtype", pack_safetensors({k: v | {"dtype": "I32"} for k, v in header.items()}, data)
    yield "metadata", pack_safetensors(header | {"__metadata__": {"a": "x" * 5_000_000}}, data)
    yield "metadata", pack_safetensors(header | {"__metadata__": {}}, data)
    yield "path-like key", pack_safetensors({("../../x" if k == name else k): v for k, v in header.items()}, data)
    yield (
        "path-like key",
        pack_safetensors(header | {"/etc/passwd\n": {**entry, "shape": [0], "data_offsets": [0, 0]}}, data),
    )
    yield "path-like key", pack_safetensors(header | {"\ud800": {**entry, "shape": [0], "data_offsets": [0, 0]}}, data)
    yield "offsets", with_entry(data_offsets=another["data_offsets"])
    yield "offsets", with_entry(data_offsets=[start + 4, end + 4])
    yield "offsets", with_entry(data_offsets=[end, start])
    yield (
        "offsets",
        pack_safetensors(header | {other: another | {"data_offsets": [n + 8 for n in another["data_offsets"]]}}, data),
    )
    yield "numbers", with_entry(shape=[-1, *entry["shape"][1:]])
    yield "numbers", with_entry(shape=[HUGE, *entry["shape"][1:]])
    yield (
        "numbers",
        pack_safetensors(
            {
                k: v | {"shape": [HUGE if n == header[name]["shape"][0] else n for n in v["shape"]]}
                for k, v in header.items()
            },
            data,
        ),
    )
    yield "numbers", with_entry(shape=[float(n) for n in entry["shape"]])
    yield "numbers", with_entry(data_offsets=[0, 2**64])
    yield "numbers", pack_safetensors(text.replace(str(end), "9" * 5000, 1), data)
    yield "numbers", with_entry(data_offsets=[True, end])
    yield "size", honest + b"\0"
    yield "size", honest + bytes(2**25)
    yield "size", pack_safetensors(header, b"")
    yield "size", pack_safetensors(header, bytes(2**25))
    yield "size", struct.pack("<Q", 2**63) + bytes(64)
    yield "size", struct.pack("<Q", 2**40) + honest[8:]
    yield "size", b""
    yield "norm", replace_values(honest, lambda values: np.full_like(values, 1e30))
    yield "norm", replace_values(honest, lambda values: np.full_like(values, 3.4e38))
    yield "norm", replace_values(honest, _put(0, 101.0))
    yield (
        "product",
        replace_values(honest, lambda values: np.full_like(values, 90 / max(1.0, len(values) / len(header)) ** 0.5)),
    )


def mutate_adapter(honest: bytes, random: Random) -> tuple[str, bytes]:
    """Mutate honest bytes once, and return the class of the mutation with the bytes."""
    way = random.randrange(6)
    if way == 0:
        flipped = bytearray(honest)
        for _ in range(random.randint(1, 4)):
            flipped[random.randrange(len(honest))] ^= 1 << random.randrange(8)
        return "bits", bytes(flipped)
    if way == 1:
        start = random.randrange(len(honest))
        return "length", random.choice((honest[:start], honest[start:], honest + honest[start:], honest[:start] * 2))
    if way == 2:
        position, length = random.randrange(len(honest)), random.randint(1, 16)
        return "splice", honest[:position] + random.randbytes(length) + honest[position + random.choice((0, length)) :]
    if way == 3:
        number = random.choice((float("nan"), float("inf"), 1e-40, -1e-40, 0.0, 99.0, 101.0, -1e38, 3.0))
        count = len(unpack_safetensors(honest)[1]) // 4
        return "values", replace_values(honest, _put(random.randrange(count), number))
    header, data = unpack_safetensors(honest)
    if way == 4:
        text = json.dumps(header)
        position = random.randrange(len(text))
        return "header", pack_safetensors(
            text[:position] + random.choice('{}[]",:0-9eN\\') + text[position + 1 :], data
        )
    _change(header, random)
    return "header", pack_safetensors(_dumped(header, random), data)


def _dumped(header: object, random: Random) -> str:
    text = json.dumps(header)
    if random.random() < 0.1 and text.startswith("{") and len(text) > 2:  # duplicates its first key
        text = text[:-1] + ", " + text[1:].split(":", 1)[0] + ": 0}"
    return text


def _change(value: dict[str, Any], random: Random) -> None:
    """Change one value or key somewhere in a JSON object."""
    if not value:
        value["extra"] = deepcopy(random.choice(ODD_VALUES))
        return
    key = random.choice(sorted(value, key=ascii))
    way = random.randrange(8)
    if way < 4 and isinstance(value[key], dict) and value[key]:
        _change(value[key], random)
    elif way == 0:
        del value[key]
    elif way == 1:
        value[random.choice(("extra", key + "x", "__metadata__", "a\nb", "\udfff", "x" * 300))] = value[key]
    elif way == 2 and isinstance(value[key], list) and value[key]:
        value[key][random.randrange(len(value[key]))] = deepcopy(random.choice(ODD_VALUES))
    elif way == 3 and type(value[key]) in (int, float) and -1e15 < value[key] < 1e15:
        value[key] = random.choice((value[key] + 1, -value[key], value[key] * 1000, float(value[key]), str(value[key])))
    else:
        value[key] = deepcopy(random.choice(ODD_VALUES))


# JSON


def json_attacks(honest: str) -> Iterator[tuple[str, str]]:
    """Yield malicious JSON texts with the name of their class."""
    fields = json.loads(honest)
    yield "JSON too long", honest + " " * MAX_JSON_CHARS
    yield "JSON too long", "9" * 30_000_000
    yield "deep nesting", "[" * 60_000
    yield "deep nesting", honest[:-1] + f'{"," if fields else ""}"a":{NESTED}}}'
    yield "not JSON", honest[:-1]
    yield "not JSON", "\x00"
    yield "not JSON", "\ud800"
    yield "not an object", "[]"
    yield "unknown field", json.dumps(fields | {"extra\n\x1b[2J": 1})
    yield "unknown field", json.dumps(fields | {"\ud800": 1})
    yield "unknown field", json.dumps(fields | {"adapter": "x"})
    for name in fields:
        yield "missing field", json.dumps({key: value for key, value in fields.items() if key != name})
        yield "duplicate key", honest[:-1] + f',"{name}":{json.dumps(fields[name])}}}'
        for value in ODD_VALUES:
            if type(value) is not type(fields[name]) or value in (HUGE, "\ud800", "x" * 201, "two\nlines", 1e300, -1):
                yield "another value", json.dumps(fields | {name: value})
        yield "huge integer", json.dumps(fields | {name: 0}).replace(f'"{name}": 0', f'"{name}": {"9" * 5000}')


def mutate_json(honest: str, random: Random) -> tuple[str, str]:
    """Mutate honest JSON once, and return the class of the mutation with the text."""
    if random.random() < 0.3:
        position = random.randrange(len(honest))
        replacement = random.choice(("", *'{}[]",:0-9eN\\\x00é', NESTED, "9" * 5000))
        return "JSON characters", honest[:position] + replacement + honest[position + random.randrange(3) :]
    fields = json.loads(honest)
    for _ in range(random.randint(1, 2)):
        _change(fields, random)
    return "JSON fields", _dumped(fields, random)


# Records


def mutate_records(message: WireMessage, random: Random) -> RecordDict:
    """Apply one random change to the records of an honest message."""
    records = to_records(message)
    config: Any = records["message"]
    data = message.adapter or b"x"
    whole: Mapping[str, Any] = {"dtype": "uint8", "shape": (len(data),), "stype": "safetensors", "data": data}
    way = random.randrange(9)
    if way == 0:
        records["extra"] = random.choice((ConfigRecord({"a": 1}), MetricRecord({"a": 1.0}), ArrayRecord()))
    elif way == 1:
        del records[random.choice(sorted(records))]
    elif way == 2:
        records["message"] = random.choice((MetricRecord({"json": 1}), ArrayRecord(), ConfigRecord()))
    elif way == 3:
        config[random.choice(("extra", "adapter"))] = random.choice((b"x", "x", 1, [1, 2], "x" * 2**20))
    elif way == 4:
        config["json"] = random.choice((message.text.encode(), 1, [message.text], True, [b"x"] * 1000))
    elif way == 5:
        if random.random() < 0.5:
            config["version"] = random.choice((0, NEWEST + 1, 2**63 - 1, -1, 1.0, "1", b"1", True, [1]))
        else:
            config["sha256"] = random.choice(("", "0" * 64, b"x", 0, ["x"], config["sha256"].upper()))
    elif way == 6:
        change = random.choice(
            (
                {"dtype": "float32"},
                {"dtype": "object"},
                {"shape": (2**62,)},
                {"shape": ()},
                {"shape": (1,) * 5000},
                {"stype": "numpy.ndarray"},
                {"stype": "pickle"},
                {"shape": (-1,)},
                {"shape": (len(data), 1)},
            )
        )
        records["arrays"] = ArrayRecord({"adapter": Array(**{**whole, **change})})
    elif way == 7:
        names = random.choice((("adapter", "other"), ("other",), (), tuple(f"a{i}" for i in range(1000))))
        records["arrays"] = ArrayRecord({name: Array(**whole) for name in names})
    else:
        records["arrays"] = random.choice((ConfigRecord({"adapter": data}), MetricRecord({"adapter": 1})))
    return records


# Flower's objects


def mutate_objects(message: WireMessage, random: Random) -> MessageAttack:
    """Create a reply whose objects, in the format of a SuperLink, are damaged or forged."""

    def prepare(request: Message) -> Delivery:
        reply = Message(to_records(message), reply_to=request)
        objects = get_all_nested_objects(reply)
        contents = {name: nested.deflate() for name, nested in objects.items()}
        changed = random.choice(list(contents))  # not sorted: an object's name depends on its creation time
        contents[changed] = _changed_object(contents[changed], random)
        if random.random() < 0.2:
            reply.metadata.__dict__["_src_node_id"] = random.randrange(1, 5)
            contents[reply.object_id] = reply.deflate()
        root = reply.object_id if reply.object_id in contents else next(reversed(contents))

        def deliver() -> Message:
            nested: Any = inflate_object_from_contents(root, dict(contents))
            return nested

        return deliver

    return MessageAttack("Flower's objects", prepare)


def _changed_object(content: bytes, random: Random) -> bytes:
    head, _, body = content.partition(b"\0")
    way = random.randrange(5)
    if way == 0:
        position = random.randrange(len(content))
        return content[:position] + bytes([content[position] ^ 1 << random.randrange(8)]) + content[position + 1 :]
    if way == 1:
        return content[: random.randrange(len(content))]
    if way == 2:
        names = (b"Array", b"ArrayRecord", b"ConfigRecord", b"Message", b"MetricRecord", b"RecordDict", b"Other")
        return random.choice(names) + head[head.find(b" ") :] + b"\0" + body
    if way == 3 and body.startswith(b"{"):
        fields = json.loads(body)
        if "arraychunk_ids" in fields and random.random() < 0.5:
            fields["arraychunk_ids"] = random.choice(([9], [-5], ["0"], [0.5], [0] * 10**5, [0] * 100, [], None))
        else:
            _change(fields, random)
        return head + b"\0" + json.dumps(fields).encode()
    return head + b"\0" + random.randbytes(random.randrange(40))


def random_attack(message: WireMessage, random: Random, *, objects: bool) -> MessageAttack:
    """Create a random attack on an honest message.

    Args:
        message: the honest message.
        random: source of randomness.
        objects: whether to attack Flower's objects too.
    """
    ways = (
        ["text", "records", "damage"] + ["payload"] * (3 if message.adapter is not None else 0) + ["objects"] * objects
    )
    match random.choice(ways):
        case "text":
            kind, text = mutate_json(message.text, random)
            return records_attack(kind, to_records(message._replace(text=text)))
        case "payload" if message.adapter is not None:
            kind, payload = mutate_adapter(message.adapter, random)
            return records_attack(kind, to_records(message._replace(adapter=payload)), payload)
        case "objects":
            return mutate_objects(message, random)
        case "damage":
            return bit_flip(message, random)
        case _:
            return records_attack("records", mutate_records(message, random))


def bit_flip(message: WireMessage, random: Random) -> MessageAttack:
    """Flip one bit of the text or the adapter, and keep the checksum of the original."""
    config: Any = to_records(message)["message"]
    sent = config["sha256"]
    text, adapter = bytearray(message.text.encode()), bytearray(message.adapter or b"")
    bit = random.randrange(8 * (len(text) + len(adapter)))
    position, mask = bit // 8, 1 << bit % 8
    if position < len(text):
        text[position] ^= mask
    else:
        adapter[position - len(text)] ^= mask
    damaged = WireMessage(
        text.decode("utf-8", "surrogateescape"), bytes(adapter) if message.adapter is not None else None
    )
    return records_attack("damage in transit", to_records(damaged, sent), damaged.adapter)
