"""Limits: values of the right type that no valid message contains are rejected."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from common.errors import AntherError
from protocol import limits
from protocol.messages import Evaluation, Update, from_json, payloads, to_json
from protocol.quantization import PRECISIONS
from tests.protocol.test_messages import REPLIES, REPORT, REQUESTS, UPDATE


@pytest.mark.parametrize("message", REQUESTS + REPLIES, ids=lambda message: type(message).__name__)
def test_valid_messages_pass(message: Any) -> None:
    limits.check(message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round", -1),
        ("round", 2**31),
        ("rank", 10**4000),
        ("events", -1),
        ("seconds", -0.5),
        ("joules", 1e13),
        ("epsilon", -1.0),
        ("epsilon", float("nan")),
        ("loss", float("inf")),
        ("quality", "guessed"),
        ("quality", ""),
        ("device", "a" * 201),
        ("device", "two\nlines"),
        ("run", "\ud800"),
        ("run", "\x1b[2J"),
        ("run", "a\u202eb"),
    ],
)
def test_out_of_range_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^Update\.{field}: must be [^\n]*$"):
        limits.check(dataclasses.replace(UPDATE, **{field: value}))


def test_battery_is_at_most_full() -> None:
    """A fuller battery would never run empty in the estimates of selection rules."""
    limits.check(dataclasses.replace(REPORT, battery=1.0))
    for battery in (1.2, 9e11):
        with pytest.raises(ValueError, match=r"DeviceReport\.battery: must be 0 to 1"):
            limits.check(dataclasses.replace(REPORT, battery=battery))


def test_limits_are_inclusive() -> None:
    largest = dataclasses.replace(UPDATE, round=limits.MAX_COUNT, seconds=limits.MAX_NUMBER, device="é" * 200)
    limits.check(largest)
    limits.check(dataclasses.replace(UPDATE, events=0, seconds=0.0, epsilon=None))


def test_gain_may_be_negative() -> None:
    message = Evaluation(device="d", round=1, base=None, shared=None, gain=-0.25)
    limits.check(message)
    with pytest.raises(ValueError, match=r"Evaluation\.gain"):
        limits.check(dataclasses.replace(message, gain=-1e13))


def test_nested_values_are_checked() -> None:
    train = REQUESTS[1]
    plan = dataclasses.replace(train.plan, privacy=dataclasses.replace(train.plan.privacy, clip=-1.0))
    with pytest.raises(ValueError, match=r"Train\.plan\.privacy\.clip: must be 0 to 1e\+12"):
        limits.check(dataclasses.replace(train, plan=plan))


def test_unknown_precision_is_rejected() -> None:
    train = REQUESTS[1]
    for update in ("fp32", *PRECISIONS):
        limits.check(dataclasses.replace(train, plan=dataclasses.replace(train.plan, update=update)))
    with pytest.raises(ValueError, match=r"Train\.plan\.update: must be one of fp32, fp16, int8, int4"):
        limits.check(dataclasses.replace(train, plan=dataclasses.replace(train.plan, update="int2")))


@dataclasses.dataclass(frozen=True)
class _NestedMessage:
    """A dataclass with nested containers."""

    names: tuple[str, ...]
    sizes: dict[str, int]


def test_tuples_and_dictionaries_are_checked() -> None:
    limits.check(_NestedMessage(("a", "b"), {"a": 1}))
    for wrong, where in [
        (_NestedMessage(("a", "\n"), {}), r"_NestedMessage\.names\[1\]"),
        (_NestedMessage((), {"\n": 1}), r"_NestedMessage\.sizes, key 0"),
        (_NestedMessage((), {"a": -1}), r"_NestedMessage\.sizes, value 0"),
    ]:
        with pytest.raises(ValueError, match=where):
            limits.check(wrong)


def test_decoding_checks_limits() -> None:
    for message, field, value in [(UPDATE, "events", -1), (REPORT, "device", "a\nb"), (REQUESTS[1], "echo", 2**40)]:
        fields = json.loads(to_json(message)) | {field: value}
        with pytest.raises(AntherError, match=f"malformed message: {type(message).__name__}.{field}: must be"):
            from_json(type(message), json.dumps(fields), **payloads(message))
    assert from_json(Update, to_json(UPDATE), adapter=UPDATE.adapter) == UPDATE
