"""Tests of attacks in both directions: nothing crashes, and no accepted message violates an invariant.

The invariants are those of `bench.robustness.invariants`, which shares no code with the code under test; tests also
show that they can be violated.
"""

from __future__ import annotations

import json
import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.robustness.attack_corpus import (
    MessageAttack,
    WireMessage,
    adapter_attacks,
    random_attack,
    records_attack,
    replace_values,
    to_records,
)
from bench.robustness.gate import AttackCounts, AttackTable, corpus, failures, run, table
from bench.robustness.ingress import ACCEPTED, Ingress, ingresses
from bench.robustness.invariants import ExpectedMessage, violations
from models.lora.adapter import Site
from protocol import tensor_codec

SITES = {"down.to_q": Site(6, 4), "up.to_k": Site(3, 5)}
SIZES = {name: (site.inputs, site.outputs) for name, site in SITES.items()}
RANK = 2
TO_SERVER = ("Update", "Evaluation", "Personalized", "DeviceReport")
NAMES = ("Update", "Train", "Evaluation", "Personalized", "DeviceReport", "Evaluate", "Personalize", "Query")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Silence the log of thousands of refusals."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def entry_points(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ingress]:
    return ingresses(SITES, rank=RANK, folder=tmp_path_factory.mktemp("device"))


def judge(ingress: Ingress, attack: MessageAttack) -> str:
    """Return the outcome of an attack; fails on a crash, or if an invariant is violated by an accepted message."""
    opened = ingress.open(attack)
    reason = opened.deliver()
    assert not reason.startswith("crash"), (attack.kind, reason)
    if reason == ACCEPTED:
        assert opened.violated() == [], attack.kind
    return reason


@pytest.mark.parametrize("name", NAMES)
def test_honest_messages_are_accepted(entry_points: dict[str, Ingress], name: str) -> None:
    message = entry_points[name].honest
    assert judge(entry_points[name], records_attack("honest", to_records(message))) == ACCEPTED


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_corpus_is_rejected(entry_points: dict[str, Ingress], name: str) -> None:
    for attack in corpus(entry_points[name], empty=10_000):
        tracemalloc.start()
        reason = judge(entry_points[name], attack)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (reason == ACCEPTED) <= (attack.kind in ("honest", "another value")), (attack.kind, reason)
        assert peak < 64 * 2**20, attack.kind


def fuzz(entry_points: dict[str, Ingress], name: str, random: Random) -> str:
    attack = random_attack(entry_points[name].honest, random, objects=name in TO_SERVER)
    return judge(entry_points[name], attack)


@pytest.mark.integration
@settings(max_examples=500)  # few mutations of a message get past its first checks
@given(name=st.sampled_from(NAMES[:2] * 4 + NAMES), random=st.randoms(use_true_random=False))
def test_fuzzed_messages(entry_points: dict[str, Ingress], name: str, random: Random) -> None:
    fuzz(entry_points, name, random)


@pytest.mark.stress
@settings(max_examples=20_000, database=None)  # the number of the claim
@given(name=st.sampled_from(NAMES[:2] * 4 + NAMES), random=st.randoms(use_true_random=False))
def test_many_fuzzed_messages(entry_points: dict[str, Ingress], name: str, random: Random) -> None:
    """`anther bench gate` sends as many messages at the real base's sizes."""
    fuzz(entry_points, name, random)


@pytest.mark.parametrize("name", ["Update", "Train"])
def test_truncations_and_bit_flips(entry_points: dict[str, Ingress], name: str) -> None:
    """With the right checksum, as an attacker would send: an accepted message is a valid adapter of other values."""
    message = entry_points[name].honest
    assert message.adapter is not None
    data = message.adapter
    for length in range(0, len(data), 3):
        cut = message._replace(adapter=data[:length])
        assert judge(entry_points[name], records_attack("cut", to_records(cut))) != ACCEPTED
    start = 8 + int.from_bytes(data[:8], "little")
    for bit in range(0, 8 * len(data), 23):
        position = bit // 8
        flipped = message._replace(
            adapter=data[:position] + bytes([data[position] ^ 1 << bit % 8]) + data[position + 1 :]
        )
        reason = judge(entry_points[name], records_attack("bit", to_records(flipped)))
        # A flip in the header could only exchange tensors' positions, which takes more than one bit.
        assert reason != ACCEPTED or position >= start


def test_norm_bound_is_sharp(entry_points: dict[str, Ingress]) -> None:
    """An adapter just below the bound is accepted, one just above is not."""
    ingress = entry_points["Update"]
    assert ingress.honest.adapter is not None
    for value, accepted in ((99.99, True), (100.01, False)):

        def one(values, value=value):  # type: ignore[no-untyped-def]
            values[:] = 0
            values[0] = value
            return values

        message = ingress.honest._replace(adapter=replace_values(ingress.honest.adapter, one))
        assert (judge(ingress, records_attack("edge", to_records(message))) == ACCEPTED) == accepted


# The invariants can be violated


EXPECTED = ExpectedMessage("Update", SIZES, RANK, {"rank": RANK, "round": 3, "device": "d"})


@pytest.mark.parametrize(
    "change",
    [
        {"round": 4},
        {"rank": 1},
        {"device": "e"},
        {"seconds": -1.0},
        {"events": True},
        {"quality": "x"},
        {"extra": 1},
        {"epsilon": 1e13},
        {"run": "a\nb"},
    ],
)
def test_wrong_field_violates(entry_points: dict[str, Ingress], change: dict[str, object]) -> None:
    message = entry_points["Update"].honest
    assert violations(to_records(message), EXPECTED) == []
    assert violations(to_records(message._replace(text=json.dumps(json.loads(message.text) | change))), EXPECTED)


def test_named_adapters_violate(entry_points: dict[str, Ingress]) -> None:
    message = entry_points["Update"].honest
    assert message.adapter is not None
    for kind, payload in adapter_attacks(message.adapter, empty=1000):
        assert violations(to_records(message._replace(adapter=payload)), EXPECTED), kind


def test_damage_violates(entry_points: dict[str, Ingress]) -> None:
    message = entry_points["Update"].honest
    assert violations(to_records(message, "0" * 64), EXPECTED) == ["damaged in transit"]
    assert violations(to_records(WireMessage(message.text, None)), EXPECTED) == ["unexpected records"]


# The benchmark detects a broken gate


def test_broken_gate_is_detected(entry_points: dict[str, Ingress], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checks of finiteness and norms, the benchmark detects both."""
    ingress = entry_points["Update"]
    assert ingress.honest.adapter is not None
    monkeypatch.setattr("strategies.round.validation.norm_violation", lambda _adapter: None)
    monkeypatch.setattr(tensor_codec, "_finite", lambda _values: True)
    for value in (1e30, float("nan")):
        payload = replace_values(ingress.honest.adapter, lambda values, value=value: values * 0 + value)
        opened = ingress.open(records_attack("wrong", to_records(ingress.honest._replace(adapter=payload))))
        assert opened.deliver() == ACCEPTED
        assert opened.violated() != []


def test_crashes_are_failures() -> None:
    rows: AttackTable = {
        ("to server", "a"): AttackCounts(),
        ("to server", "b"): AttackCounts(),
        ("to server", "c"): AttackCounts(),
    }
    rows["to server", "a"].add("crash KeyError", 1.0, 1.0, [])
    rows["to server", "b"].add(ACCEPTED, 1.0, 1.0, ["norm"])
    rows["to server", "c"].add("codec", 101.0, 1.0, [])
    assert [line.split(": ")[1] for line in failures(rows)] == [
        "crash KeyError",
        "1 accepted against an invariant",
        "101 ms and 1 MiB at worst",
    ]
    assert table(rows, {}).row_count == 3


@pytest.mark.stress
def test_whole_measurement(tmp_path: Path) -> None:
    """Run with `pytest -m stress`; with small sizes and few messages the bounds hold with a large margin."""
    torch.set_num_threads(1)
    gate, peer = run(SITES, rank=RANK, fuzzed=500, seed=1, folder=tmp_path, empty=10_000)
    assert [line for line in failures(gate) if " at worst" not in line] == []
    assert sum(row.reasons.total() for row in gate.values()) > 1000
    assert max(row.mib for row in gate.values()) < 64
    assert sum(row.violating for row in peer.values()) > 0  # the peer accepts violating messages
