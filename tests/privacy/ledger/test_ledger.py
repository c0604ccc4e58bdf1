"""The ledger: no refunds, no lost charges, no second release; in files and in a fleet's database."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import privacy.ledger.ledger
from common.errors import AntherError
from privacy.accounting import Mechanism, NonPrivate, PoissonGaussian
from privacy.ledger import entries, hash_chain
from privacy.ledger.ledger import (
    MEASURE,
    RESERVED,
    SEALED,
    SENT,
    DeviceLedger,
    LedgerEntry,
    LedgerHistory,
    Reservation,
    _HistoryCache,
)
from privacy.policy import Policy, RequestRefusedError
from tests.helpers.storages import STORED_DEVICES, FileDevice, StoredDevice

GAUSSIAN = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=25)
FIRST = Reservation(
    run="run/../Ω",
    round=1,
    base="b" * 64,
    adapter="a" * 64,
    plan="p1",
    data="d" * 64,
    mechanism=GAUSSIAN,
    clip=0.01,
    release=True,
)  # the server chooses the name of the run
KEY, PLAN = FIRST.key, FIRST.plan


def _refuse_all(_past: Sequence[Mechanism], _new: Mechanism) -> None:
    raise RequestRefusedError("not this one")


def free(_past: Sequence[Mechanism], _new: Mechanism) -> None:
    """Allow any reservation."""


@pytest.fixture(params=STORED_DEVICES)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> StoredDevice:
    result: StoredDevice = request.param(tmp_path)
    return result


def test_round_from_reservation_to_delivery(kept: StoredDevice) -> None:
    ledger = DeviceLedger(kept.storage())
    assert ledger.sealed(KEY, PLAN) is None
    ledger.reserve(FIRST, free)
    assert ledger.entries() == (LedgerEntry(FIRST, RESERVED),)
    assert ledger.sealed(KEY, PLAN) is None
    assert ledger.seal(FIRST, b"reply") == b"reply"
    assert DeviceLedger(kept.storage()).sealed(KEY, PLAN) == b"reply"
    assert [entry.state for entry in ledger.entries()] == [SEALED]
    ledger.reserve(replace(FIRST, round=2), free, settles=True)
    assert [entry.state for entry in ledger.entries()] == [SENT, RESERVED]
    assert not kept.blobs()
    with pytest.raises(RequestRefusedError, match="can't be sent again"):
        ledger.sealed(KEY, PLAN)
    assert len(kept.lines()) == 5  # including the enrollment


def test_only_earlier_rounds_of_the_run_are_settled(kept: StoredDevice) -> None:
    ledger = DeviceLedger(kept.storage())
    for reservation in (FIRST, replace(FIRST, purpose=MEASURE), replace(FIRST, run="another"), replace(FIRST, round=3)):
        ledger.reserve(reservation, free)
        ledger.seal(reservation, b"reply")
    ledger.reserve(replace(FIRST, round=4), free)
    assert [entry.state for entry in ledger.entries()] == [SEALED] * 4 + [RESERVED]
    ledger.reserve(replace(FIRST, round=3), free, settles=True)  # again, as after a crash
    assert [entry.state for entry in ledger.entries()] == [SENT] + [SEALED] * 3 + [RESERVED]
    assert len(kept.blobs()) == 3
    with pytest.raises(RequestRefusedError, match="not this one"):
        ledger.reserve(replace(FIRST, round=5), _refuse_all, settles=True)
    assert ledger.sealed(replace(FIRST, run="another").key, PLAN) == b"reply"


def test_both_storages_have_the_same_lines(tmp_path: Path) -> None:
    result = []
    for form in STORED_DEVICES:
        kept = form(tmp_path)
        ledger = DeviceLedger(kept.storage())
        ledger.reserve(FIRST, free)
        ledger.seal(FIRST, b"reply")
        result.append(([without_random_fields(line) for line in kept.lines()], kept.blobs()))
    assert result[0] == result[1]


def without_random_fields(line: bytes) -> dict[str, object]:
    """Return an event without its random id, time and link."""
    return {name: value for name, value in json.loads(line).items() if name not in ("ledger", "at", "previous")}


def test_files_stay_in_the_device_folder(tmp_path: Path) -> None:
    ledger = DeviceLedger(FileDevice(tmp_path).storage())
    ledger.reserve(FIRST, free)
    ledger.seal(FIRST, b"reply")
    assert {path.name for path in tmp_path.iterdir()} == {"device", "device.heads"}
    assert [path.name for path in (tmp_path / "device.heads").iterdir()] == ["ledger.jsonl"]
    assert (tmp_path / "device.heads").stat().st_mode & 0o077 == 0
    assert (tmp_path / "device").stat().st_mode & 0o077 == 0


def test_second_seal_returns_the_first_reply(kept: StoredDevice) -> None:
    ledger = DeviceLedger(kept.storage())
    ledger.reserve(FIRST, free)
    ledger.seal(FIRST, b"first")
    assert DeviceLedger(kept.storage()).seal(FIRST, b"second") == b"first"
    assert ledger.sealed(KEY, PLAN) == b"first"


def test_reserved_round_is_charged_exactly_once(kept: StoredDevice) -> None:
    ledger = DeviceLedger(kept.storage())
    ledger.reserve(FIRST, free)
    once = ledger.spent(1e-3)
    ledger.reserve(FIRST, free)  # the same round again, as after a crash
    assert ledger.spent(1e-3) == once
    ledger.reserve(replace(FIRST, round=2), free)
    assert once.value < ledger.spent(1e-3).value == pytest.approx(2.355, abs=0.02)  # 50 steps: field anchor
    ledger.reserve(replace(FIRST, round=3, mechanism=NonPrivate(), clip=None), free)
    assert ledger.spent(1e-3).value == float("inf")


def test_events_of_other_processes_are_seen(kept: StoredDevice) -> None:
    """A cached history is used only if the journal is unchanged."""
    ledger = DeviceLedger(kept.storage())
    for number in range(1, 6):
        assert len(ledger.entries()) == len(DeviceLedger(kept.storage()).entries()) == number - 1
        (ledger if number % 2 else DeviceLedger(kept.storage())).reserve(replace(FIRST, round=number), free)
    whole = kept.lines()
    for damaged in (whole[:2], [*whole[:2], whole[3]], [*whole[:-2], whole[-1], whole[-2]], [*whole, whole[-1]]):
        kept.put_lines(damaged)
        with pytest.raises(AntherError, match=r"ledger\.jsonl"):
            ledger.entries()
    kept.put_lines(whole)
    assert [entry.reservation.round for entry in ledger.entries()] == [1, 2, 3, 4, 5]


def test_cached_history_equals_replayed_history(kept: StoredDevice) -> None:
    """After its own events, a ledger doesn't read its lines again: its cache must equal a replay of the lines."""
    ledger = DeviceLedger(kept.storage())
    for number, mechanism in enumerate((GAUSSIAN, NonPrivate(), GAUSSIAN), start=1):
        reservation = replace(
            FIRST, round=number, mechanism=mechanism, clip=None if mechanism == NonPrivate() else 0.1 + 0.2
        )
        known = [ledger.reserve(reservation, free, settles=True)]
        read = [entries.replay(kept.lines(), "ledger")]
        ledger.seal(reservation, b"reply")
        known.append(ledger.history())
        read.append(entries.replay(kept.lines(), "ledger"))
        assert known == read
        assert [entry.at for entry in known[1].entries.values()] == [entry.at for entry in read[1].entries.values()]


def test_history_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.ledger.ledger._histories", _HistoryCache(max_size=2))
    ledgers = [DeviceLedger(FileDevice(tmp_path / str(number)).storage()) for number in range(4)]
    for number in (1, 2, 3):
        for ledger in ledgers:
            ledger.reserve(replace(FIRST, round=number), free)
            ledger.seal(replace(FIRST, round=number), b"reply")
            assert [entry.state for entry in ledger.entries()] == [SEALED] * number
    assert len(privacy.ledger.ledger._histories._cached) == 2


def test_simulated_noise_is_charged(tmp_path: Path) -> None:
    real, test = FileDevice(tmp_path / "real"), FileDevice(tmp_path / "test")
    DeviceLedger(real.storage()).reserve(FIRST, free)
    DeviceLedger(test.storage()).reserve(replace(FIRST, release=False), free)
    assert DeviceLedger(test.storage()).spent(1e-3) == DeviceLedger(real.storage()).spent(1e-3)
    assert json.loads(test.lines()[1])["release"] is False


@pytest.mark.parametrize("seal", [False, True])
def test_second_plan_for_a_round_is_refused(kept: StoredDevice, seal: bool) -> None:
    ledger = DeviceLedger(kept.storage())
    ledger.reserve(FIRST, free)
    if seal:
        ledger.seal(FIRST, b"reply")
    other = replace(FIRST, plan="p2")
    for attempt in (lambda: ledger.reserve(other, free), lambda: ledger.sealed(KEY, other.plan)):
        with pytest.raises(RequestRefusedError, match="another plan"):
            attempt()
    assert len(ledger.entries()) == 1


def test_refused_round_is_not_charged(kept: StoredDevice) -> None:
    ledger, policy = DeviceLedger(kept.storage()), Policy(max_epsilon=2.0, delta=1e-3)
    ledger.reserve(FIRST, policy.check_spending)  # ε = 1.6
    before = kept.lines()
    with pytest.raises(RequestRefusedError, match=r"ε=2\.3\d per image .* allows 2"):
        ledger.reserve(replace(FIRST, round=2), policy.check_spending)
    assert kept.lines() == before


def test_torn_last_line_is_removed(tmp_path: Path) -> None:
    """Torn at every byte of every line, with the head from before the line."""
    kept, file = FileDevice(tmp_path), tmp_path / "device/ledger.jsonl"
    ledger = DeviceLedger(kept.storage())
    ledger.reserve(FIRST, free)
    before, head = file.read_bytes(), kept.head()
    ledger.seal(FIRST, b"reply")
    after = file.read_bytes()
    for length in range(len(before), len(after)):
        file.write_bytes(after[:length])
        kept.put_head(head)
        assert [entry.state for entry in ledger.entries()] == [RESERVED]
        assert file.read_bytes() == before
    file.write_bytes(before + b"\0" * 512)  # some file systems leave this after a power failure
    ledger.seal(FIRST, b"reply")
    assert [entry.state for entry in ledger.entries()] == [SEALED]
    assert file.read_bytes().startswith(before)


def test_torn_enrollment_leaves_a_fresh_device(tmp_path: Path) -> None:
    DeviceLedger(FileDevice(tmp_path / "a").storage()).reserve(FIRST, free)
    enrollment = FileDevice(tmp_path / "a").lines()[0]
    for length in range(len(enrollment) + 1):  # the last case lacks only the line end
        kept = FileDevice(tmp_path / str(length))
        (tmp_path / str(length) / "device").mkdir(parents=True)
        (tmp_path / str(length) / "device/ledger.jsonl").write_bytes(enrollment[:length])
        ledger = DeviceLedger(kept.storage())
        assert ledger.history() == LedgerHistory()
    assert ledger.reserve(FIRST, free).events == 2


NO_EVENTS = (b"{}", b"\xff\xfe", b"[1]", b"null", b"", b'{"state": "sealed"}', b'{"previous": "x"}')
OUT_OF_TURN: tuple[dict[str, Any], ...] = (
    {"state": "sealed", "run": "x", "round": 9, "purpose": "train", "sha256": ""},
    {"state": "sent", **dict(zip(("run", "round", "purpose"), KEY, strict=True))},
    {"state": "reserved", "run": "x", "round": 9, "purpose": "train"},
    {"state": "paid", "run": "x", "round": 9, "purpose": "train"},
    {"state": "enrolled", "ledger": "twice"},
    {**entries.reserved_event(FIRST)},
    {**entries.reserved_event(replace(FIRST, round=2)), "mechanism": {"name": "laplace"}},
    {**entries.reserved_event(replace(FIRST, round=2)), "mechanism": {"name": "none", "steps": 3}},
    {**entries.reserved_event(replace(FIRST, round=2)), "more": 1},
    {name: value for name, value in entries.reserved_event(replace(FIRST, round=2)).items() if name != "data"},
    {"state": "reserved", "run": ["x"], "round": 9, "purpose": "train"},
)


@pytest.mark.parametrize("garbage", [*NO_EVENTS, *OUT_OF_TURN])
def test_invalid_line_raises_and_changes_nothing(kept: StoredDevice, garbage: bytes | dict[str, Any]) -> None:
    ledger = DeviceLedger(kept.storage())
    ledger.reserve(FIRST, free)
    lines, head = kept.lines(), kept.head()
    if isinstance(garbage, dict):  # a valid link, and an invalid event
        garbage = hash_chain.encode_event({"at": "now", **garbage}, hash_chain.chain_head(lines))
    damaged = [*lines, garbage]
    kept.put_lines(damaged)
    for attempt in (ledger.entries, lambda: ledger.reserve(replace(FIRST, round=3), free), lambda: ledger.spent(1e-3)):
        with pytest.raises(AntherError, match=r"ledger.jsonl:3: .*restore.*reset --forget") as raised:
            attempt()
        assert "\n" not in str(raised.value)
    assert (kept.lines(), kept.head()) == (damaged, head)


def test_journal_must_begin_with_enrollment(kept: StoredDevice) -> None:
    ledger = DeviceLedger(kept.storage())
    ledger.reserve(FIRST, free)
    kept.put_lines([hash_chain.encode_event({"at": "now", **entries.reserved_event(FIRST)}, hash_chain.START)])
    with pytest.raises(AntherError, match="begins with its one enrollment"):
        ledger.entries()


@pytest.mark.parametrize("damage", [None, b"Reply"])
def test_damaged_sealed_reply_is_never_replaced(kept: StoredDevice, damage: bytes | None) -> None:
    ledger = DeviceLedger(kept.storage())
    ledger.reserve(FIRST, free)
    ledger.seal(FIRST, b"reply")
    (name,) = kept.blobs()
    kept.put_blob(name, damage)
    for attempt in (lambda: ledger.sealed(KEY, PLAN), lambda: ledger.seal(FIRST, b"another")):
        with pytest.raises(AntherError, match="second release"):
            attempt()


@pytest.mark.parametrize("shared", [False, True])
def test_concurrent_reservations_respect_the_budget(kept: StoredDevice, shared: bool) -> None:
    policy, refused, storage = Policy(max_epsilon=2.0, delta=1e-3), [], kept.storage()
    DeviceLedger(storage).entries()

    def reserve(number: int) -> None:
        try:
            ledger = DeviceLedger(storage if shared else kept.storage())
            ledger.reserve(replace(FIRST, round=number), policy.check_spending)
        except RequestRefusedError as refusal:
            refused.append(refusal)

    threads = [threading.Thread(target=reserve, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(DeviceLedger(kept.storage()).entries()) == 1
    assert len(refused) == 5


def test_seal_records_its_inputs(kept: StoredDevice) -> None:
    """A reserved round that began on other pictures is trained again: one charge, one release, a true record."""
    ledger = DeviceLedger(kept.storage())
    ledger.reserve(replace(FIRST, release=False), free)
    spent = ledger.spent(1e-3)
    now = replace(FIRST, data="e" * 64, adapter="c" * 64, release=True)
    ledger.reserve(now, free)
    ledger.seal(now, b"reply")
    (entry,) = DeviceLedger(kept.storage()).entries()
    assert entry.reservation == now
    assert len(entry.at) == 2
    assert ledger.spent(1e-3) == spent
    assert len(kept.lines()) == 3


def test_evaluation_of_a_round_is_charged_separately(kept: StoredDevice) -> None:
    ledger, measure = DeviceLedger(kept.storage()), replace(FIRST, purpose=MEASURE, plan="m", data="v" * 64)
    ledger.reserve(FIRST, free)
    one = ledger.spent(1e-3).value
    ledger.reserve(measure, free)
    assert ledger.spent(1e-3).value > one
    ledger.seal(measure, b"gain")
    assert ledger.sealed(KEY, PLAN) is None
    assert ledger.seal(FIRST, b"reply") == b"reply"
    assert ledger.sealed(measure.key, "m") == b"gain"
    assert len(kept.blobs()) == 2
    assert [entry.state for entry in ledger.entries()] == [SEALED, SEALED]
    assert ledger.sealed(KEY, PLAN) == b"reply"


def test_echo_can_only_refuse(kept: StoredDevice) -> None:
    ledger = DeviceLedger(kept.storage())
    with pytest.raises(RequestRefusedError, match="holds 0 events and the server heard of 1"):
        ledger.sealed(KEY, PLAN, echo=1)
    assert ledger.reserve(FIRST, free).events == 2
    ledger.seal(FIRST, b"reply")
    for echo in (-1, 0, 1, 3):
        assert ledger.sealed(KEY, PLAN, echo=echo) == b"reply"
    for attempt in (KEY, replace(FIRST, round=2).key):
        with pytest.raises(RequestRefusedError, match="holds 3 events and the server heard of 4"):
            ledger.sealed(attempt, PLAN, echo=4)
    with pytest.raises(RequestRefusedError, match="another plan"):
        ledger.sealed(KEY, "p2", echo=-5)
    assert len(kept.lines()) == 3
