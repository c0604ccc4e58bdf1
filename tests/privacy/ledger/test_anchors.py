"""Anchors distinguish a missing, truncated, edited or copied ledger from a fresh one and from the result of a crash."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import AntherError
from privacy.ledger import hash_chain
from privacy.ledger.anchors import JournalHead
from privacy.ledger.ledger import JOURNAL, MARKER, OUTBOX, RESERVED, SEALED, DeviceLedger, LedgerHistory
from privacy.storage import FileStorage
from tests.helpers.storages import STORED_DEVICES, FileDevice, StoredDevice
from tests.privacy.ledger.test_ledger import FIRST, KEY, PLAN, free

ROUNDS = 3


@pytest.fixture(params=STORED_DEVICES)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> StoredDevice:
    """Create a stored device that answered some rounds."""
    result: StoredDevice = request.param(tmp_path)
    answer_rounds(DeviceLedger(result.storage()), ROUNDS)
    return result


def answer_rounds(ledger: DeviceLedger, rounds: int, run: str = "run") -> None:
    for number in range(1, rounds + 1):
        reservation = replace(FIRST, run=run, round=number)
        ledger.reserve(reservation, free)
        ledger.seal(reservation, b"reply")


def assert_refused(kept: StoredDevice, match: str) -> None:
    """Assert that every operation of the ledger is refused, and that nothing changes."""
    ledger, before = DeviceLedger(kept.storage()), (kept.lines(), kept.head(), kept.blobs())
    for attempt in (
        ledger.entries,
        lambda: ledger.reserve(replace(FIRST, round=99), free),
        lambda: ledger.seal(replace(FIRST, run="run", round=1), b"another"),
        lambda: ledger.sealed(KEY, PLAN),
        lambda: ledger.reserve(replace(FIRST, round=99), free, settles=True),
        lambda: ledger.spent(1e-3),
    ):
        with pytest.raises(AntherError, match=match) as raised:
            attempt()
        assert "reset --forget" in str(raised.value)
        assert "\n" not in str(raised.value)
    assert (kept.lines(), kept.head(), kept.blobs()) == before


def assert_not_charged(kept: StoredDevice, match: str) -> None:
    before = (kept.lines(), kept.head())
    with pytest.raises(AntherError, match=match):
        DeviceLedger(kept.storage()).reserve(replace(FIRST, round=99), free)
    assert (kept.lines(), kept.head()) == before


def test_changed_lines_are_detected(kept: StoredDevice) -> None:
    complete_ledger = kept.lines()
    assert len(complete_ledger) == 1 + 2 * ROUNDS
    for index, line in enumerate(complete_ledger):
        number = index + 1
        edited = line.replace(b'"at":"2', b'"at":"1')
        assert edited != line
        kept.put_lines([*complete_ledger[:index], edited, *complete_ledger[number:]])
        last = number == len(complete_ledger)
        assert_refused(kept, rf":{number}: not the line" if last else rf":{number + 1}: doesn't follow")
        kept.put_lines([*complete_ledger[:index], *complete_ledger[number:]])
        assert_refused(kept, "cut short" if last else rf":{number}: doesn't follow")
        kept.put_lines([*complete_ledger[:index], line, *complete_ledger[index:]])
        assert_refused(kept, rf":{number + 1}: doesn't follow")
    for one, other in combinations(range(len(complete_ledger)), 2):
        swapped = list(complete_ledger)
        swapped[one], swapped[other] = complete_ledger[other], complete_ledger[one]
        kept.put_lines(swapped)
        assert_refused(kept, "doesn't follow")
    kept.put_lines(complete_ledger)
    assert len(DeviceLedger(kept.storage()).entries()) == ROUNDS


def test_truncated_ledger_is_refused(kept: StoredDevice) -> None:
    complete_ledger = kept.lines()
    for length in range(1, len(complete_ledger)):
        kept.put_lines(complete_ledger[:length])
        assert_refused(kept, f"cut short or rolled back: it holds {length} events of {len(complete_ledger)}")


def test_missing_ledger_is_refused(kept: StoredDevice) -> None:
    """Head or marker suffice to distinguish it from a fresh device. Without all three it is a fresh device."""
    head, marker = kept.head(), kept.storage().read(MARKER)
    kept.put_lines([])
    assert_refused(kept, "of 7 events is missing")
    kept.put_blob(MARKER, None)
    assert_refused(kept, "of 7 events is missing")
    kept.put_blob(MARKER, marker)
    kept.put_head(None)
    assert_refused(kept, "is missing")
    kept.put_blob(MARKER, None)
    ledger = DeviceLedger(kept.storage())
    assert ledger.history() == LedgerHistory()
    ledger.reserve(FIRST, free)
    assert kept.head() != head


def test_missing_head_is_refused(kept: StoredDevice) -> None:
    kept.put_head(None)
    assert_refused(kept, "head is missing")
    kept.put_blob(MARKER, None)
    assert_refused(kept, "head is missing")
    kept.put_lines(kept.lines()[:1])
    DeviceLedger(kept.storage()).entries()  # the state after a crash during enrollment: nothing was charged


def test_missing_marker_is_restored(kept: StoredDevice) -> None:
    marker = kept.storage().read(MARKER)
    kept.put_blob(MARKER, None)
    DeviceLedger(kept.storage()).reserve(FIRST, free)
    assert kept.storage().read(MARKER) == marker


def test_outdated_head_is_repaired(kept: StoredDevice) -> None:
    """By one event after a crash; by more if a backup of heads was restored and the journal is complete."""
    complete_ledger, now = kept.lines(), kept.head()
    ledger = json.loads(complete_ledger[0])["ledger"]
    for events in range(1, len(complete_ledger)):
        kept.put_head(JournalHead(ledger, events, hash_chain.chain_head(complete_ledger[:events])).to_json())
        assert len(DeviceLedger(kept.storage()).entries()) == ROUNDS
        assert kept.head() == now


def test_line_is_durable_before_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes a line of a process that was killed before its fsync: a power failure may still remove it."""
    kept, done = FileDevice(tmp_path), list[str]()
    ledger = DeviceLedger(kept.storage())
    ledger.reserve(FIRST, free)
    head = kept.head()
    ledger.seal(FIRST, b"reply")
    kept.put_head(head)
    sync, replaced, journal = os.fsync, os.replace, (tmp_path / "device" / JOURNAL).stat()

    def fsync(handle: int) -> None:
        done.append("synced" if os.path.samestat(os.fstat(handle), journal) else "other")
        sync(handle)

    def rename(source: str, target: str) -> None:
        done.append("head" if str(target).endswith(f"device.heads/{JOURNAL}") else "other")
        replaced(source, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", rename)
    ledger.entries()
    assert [call for call in done if call != "other"] == ["synced", "head"]
    done.clear()
    ledger.entries()
    assert not done
    ledger.reserve(replace(FIRST, round=2), free)
    assert [call for call in done if call != "other"] == ["synced", "head"]


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (lambda now: replace(now, events=now.events + 1), "holds 7 events of 8"),
        (lambda now: replace(now, events=10**9), "holds 7 events of 1000000000"),
        (lambda now: replace(now, sha256="0" * 64), ":7: not the line"),
        (lambda now: replace(now, events=now.events - 1), ":6: not the line"),
        (lambda now: replace(now, ledger="another"), "brought from elsewhere"),
        (lambda now: replace(now, events=0), "not the head of a ledger"),
    ],
)
def test_inconsistent_head_is_refused(
    kept: StoredDevice, head: Callable[[JournalHead], JournalHead], match: str
) -> None:
    now = JournalHead(**json.loads(kept.head() or b""))
    kept.put_head(head(now).to_json())
    assert_refused(kept, match)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"ledger": "x", "events": "many", "sha256": ""}'])
def test_damaged_anchor_is_refused(kept: StoredDevice, data: bytes) -> None:
    head = kept.head()
    kept.put_head(data)
    assert_refused(kept, "not the head")
    kept.put_head(head)
    kept.put_blob(MARKER, data)
    assert_not_charged(kept, "not the marker")


def test_clone_of_another_device_is_refused(tmp_path: Path) -> None:
    ada, bob = FileDevice(tmp_path / "ada"), FileDevice(tmp_path / "bob")
    for name, device in (("ada", ada), ("bob", bob)):
        answer_rounds(DeviceLedger(device.storage()), ROUNDS, run=name)
    shutil.rmtree(tmp_path / "bob/device")
    shutil.copytree(tmp_path / "ada/device", tmp_path / "bob/device")
    assert_refused(bob, "brought from elsewhere")
    head = ada.head()
    bob.put_head(head)  # also its head, but not its marker
    (tmp_path / "bob/device" / MARKER).write_text('{"ledger": "bob", "head": "x"}')
    assert_not_charged(bob, "brought from elsewhere")
    shutil.copytree(tmp_path / "ada/device", tmp_path / "elsewhere/device")
    assert_refused(FileDevice(tmp_path / "elsewhere"), "head is missing")
    answer_rounds(DeviceLedger(ada.storage()), ROUNDS, run="ada")  # the original is unaffected


def test_restored_backup_is_detected(tmp_path: Path) -> None:
    kept = FileDevice(tmp_path)
    for number in range(1, 4):
        reservation = replace(FIRST, round=number)
        DeviceLedger(kept.storage()).reserve(reservation, free)
        DeviceLedger(kept.storage()).seal(reservation, b"reply")
        shutil.copytree(tmp_path / "device", tmp_path / f"backup-{number}")
    for number in (1, 2, 3):
        shutil.rmtree(tmp_path / "device")
        shutil.copytree(tmp_path / f"backup-{number}", tmp_path / "device")
        if number < 3:
            assert_refused(kept, "rolled back")
    assert len(DeviceLedger(kept.storage()).entries()) == 3


@pytest.fixture
def complete_ledger(tmp_path: Path) -> dict[Path, bytes]:
    """Return journal and head of a device that answered one round."""
    answer_rounds(DeviceLedger(FileDevice(tmp_path).storage()), 1)
    return {file: file.read_bytes() for file in (tmp_path / "device" / JOURNAL, tmp_path / "device.heads" / JOURNAL)}


@pytest.mark.integration
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_flipped_bit_is_detected(complete_ledger: dict[Path, bytes], at: int, bit: int) -> None:
    """In the journal it breaks a link or contradicts the head; in the head it contradicts the journal."""
    places = [(file, index) for file, data in complete_ledger.items() for index in range(len(data))]
    file, index = places[at % len(places)]
    damaged = bytearray(complete_ledger[file])
    damaged[index] ^= 1 << bit
    file.write_bytes(damaged)
    with pytest.raises(AntherError):
        DeviceLedger(FileStorage(file.parent.with_name("device"))).entries()
    for every, data in complete_ledger.items():
        every.write_bytes(data)


@pytest.mark.integration
@pytest.mark.parametrize("form", STORED_DEVICES)
def test_concurrent_processes_keep_one_chain(form: type[FileDevice], tmp_path: Path) -> None:
    """The processes also enroll concurrently."""
    kept, children = form(tmp_path), []
    for child in range(4):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                ledger = DeviceLedger(form(tmp_path).storage())
                for number in range(1, 6):
                    reservation = replace(FIRST, run=f"run {child}", round=number)
                    ledger.reserve(reservation, free)
                    ledger.seal(reservation, str(child).encode())
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    history = DeviceLedger(kept.storage()).history()
    assert history.events == len(kept.lines()) == 1 + 4 * 5 * 2
    assert [entry.state for entry in history.entries.values()] == [SEALED] * 20


def test_set_aside_ledger_can_be_restored(tmp_path: Path) -> None:
    kept, files = FileDevice(tmp_path), FileStorage(tmp_path / "device")
    answer_rounds(DeviceLedger(files), ROUNDS)
    before = (kept.lines(), kept.head(), kept.blobs())
    aside = files.set_aside(JOURNAL, OUTBOX, MARKER)
    assert aside is not None
    assert DeviceLedger(files).history() == LedgerHistory()
    DeviceLedger(files).reserve(FIRST, free)
    again = files.set_aside(JOURNAL, OUTBOX, MARKER)
    assert again not in (None, aside)
    assert not (tmp_path / "device" / OUTBOX).exists()
    for name in (JOURNAL, OUTBOX, MARKER):
        (aside / name).rename(tmp_path / "device" / name)
    (aside / "head").rename(tmp_path / "device.heads" / JOURNAL)
    aside.rmdir()
    shutil.rmtree(again or "")
    (tmp_path / "device/ledger.jsonl").stat()
    assert len(DeviceLedger(files).entries()) == ROUNDS
    assert (kept.lines(), kept.head(), kept.blobs()) == before


def test_set_aside_without_ledger(tmp_path: Path) -> None:
    assert FileStorage(tmp_path / "device").set_aside(JOURNAL, OUTBOX, MARKER) is None
    assert not (tmp_path / "device").exists()


def test_waiting_writer_uses_the_new_ledger(tmp_path: Path) -> None:
    files = FileStorage(tmp_path / "device")
    answer_rounds(DeviceLedger(files), 1)
    with files.journal(JOURNAL):
        waiter = threading.Thread(target=lambda: DeviceLedger(FileStorage(tmp_path / "device")).reserve(FIRST, free))
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
        for path, to in ((files.folder / JOURNAL, "old"), (files.folder / MARKER, "m"), (files.heads / JOURNAL, "h")):
            path.rename(tmp_path / to)
    waiter.join()
    assert len((tmp_path / "old").read_bytes().splitlines()) == 3
    (entry,) = DeviceLedger(files).entries()
    assert (entry.reservation, entry.state) == (FIRST, RESERVED)
