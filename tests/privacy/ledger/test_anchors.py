"""A ledger that is missing, shortened, edited or brought from elsewhere is told from a fresh one, and from a crash."""

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
from tests.helpers.storages import FORMS, Kept, KeptFiles
from tests.privacy.ledger.test_ledger import FIRST, KEY, PLAN, free

ROUNDS = 3


@pytest.fixture(params=FORMS)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    """A device that answered some rounds."""
    found: Kept = request.param(tmp_path)
    answer(DeviceLedger(found.storage()), ROUNDS)
    return found


def answer(ledger: DeviceLedger, rounds: int, run: str = "run") -> None:
    for number in range(1, rounds + 1):
        made = replace(FIRST, run=run, round=number)
        ledger.reserve(made, free)
        ledger.seal(made, b"reply")


def refused(kept: Kept, match: str) -> None:
    """Whatever is asked of the ledger, and nothing is changed."""
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


def not_charged(kept: Kept, match: str) -> None:
    before = (kept.lines(), kept.head())
    with pytest.raises(AntherError, match=match):
        DeviceLedger(kept.storage()).reserve(replace(FIRST, round=99), free)
    assert (kept.lines(), kept.head()) == before


def test_every_line_is_linked_and_the_last_is_held_by_the_head(kept: Kept) -> None:
    whole = kept.lines()
    assert len(whole) == 1 + 2 * ROUNDS
    for place, line in enumerate(whole):
        number = place + 1
        edited = line.replace(b'"at":"2', b'"at":"1')
        assert edited != line
        kept.put_lines([*whole[:place], edited, *whole[number:]])
        last = number == len(whole)
        refused(kept, rf":{number}: not the line" if last else rf":{number + 1}: doesn't follow")
        kept.put_lines([*whole[:place], *whole[number:]])
        refused(kept, "cut short" if last else rf":{number}: doesn't follow")
        kept.put_lines([*whole[:place], line, *whole[place:]])
        refused(kept, rf":{number + 1}: doesn't follow")
    for one, other in combinations(range(len(whole)), 2):
        swapped = list(whole)
        swapped[one], swapped[other] = whole[other], whole[one]
        kept.put_lines(swapped)
        refused(kept, "doesn't follow")
    kept.put_lines(whole)
    assert len(DeviceLedger(kept.storage()).entries()) == ROUNDS


def test_a_shortened_ledger(kept: Kept) -> None:
    whole = kept.lines()
    for length in range(1, len(whole)):
        kept.put_lines(whole[:length])
        refused(kept, f"cut short or rolled back: it holds {length} events of {len(whole)}")


def test_a_missing_ledger(kept: Kept) -> None:
    """Head and marker each tell it from a fresh device; without all three it is one."""
    head, marker = kept.head(), kept.storage().read(MARKER)
    kept.put_lines([])
    refused(kept, "of 7 events is missing")
    kept.put_blob(MARKER, None)
    refused(kept, "of 7 events is missing")
    kept.put_blob(MARKER, marker)
    kept.put_head(None)
    refused(kept, "is missing")
    kept.put_blob(MARKER, None)
    ledger = DeviceLedger(kept.storage())
    assert ledger.history() == LedgerHistory()
    ledger.reserve(FIRST, free)
    assert kept.head() != head


def test_a_missing_head(kept: Kept) -> None:
    kept.put_head(None)
    refused(kept, "head is missing")
    kept.put_blob(MARKER, None)
    refused(kept, "head is missing")
    kept.put_lines(kept.lines()[:1])
    DeviceLedger(kept.storage()).entries()  # as a crash while enrolling leaves it: nothing was charged


def test_a_marker_that_alone_is_missing_is_put_back(kept: Kept) -> None:
    marker = kept.storage().read(MARKER)
    kept.put_blob(MARKER, None)
    DeviceLedger(kept.storage()).reserve(FIRST, free)
    assert kept.storage().read(MARKER) == marker


def test_a_head_behind_is_mended(kept: Kept) -> None:
    """By one event after a crash; by more after a backup of heads was restored: the journal holds all of it."""
    whole, now = kept.lines(), kept.head()
    ledger = json.loads(whole[0])["ledger"]
    for events in range(1, len(whole)):
        kept.put_head(JournalHead(ledger, events, hash_chain.chain_head(whole[:events])).to_json())
        assert len(DeviceLedger(kept.storage()).entries()) == ROUNDS
        assert kept.head() == now


def test_a_line_is_durable_before_the_head_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of a process that was killed before its fsync, too: a power cut may still take it back."""
    kept, done = KeptFiles(tmp_path), list[str]()
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
def test_a_head_of_another_past(kept: Kept, head: Callable[[JournalHead], JournalHead], match: str) -> None:
    now = JournalHead(**json.loads(kept.head() or b""))
    kept.put_head(head(now).to_json())
    refused(kept, match)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"ledger": "x", "events": "many", "sha256": ""}'])
def test_a_damaged_anchor(kept: Kept, data: bytes) -> None:
    head = kept.head()
    kept.put_head(data)
    refused(kept, "not the head")
    kept.put_head(head)
    kept.put_blob(MARKER, data)
    not_charged(kept, "not the marker")


def test_a_clone_of_another_device(tmp_path: Path) -> None:
    ada, bob = KeptFiles(tmp_path / "ada"), KeptFiles(tmp_path / "bob")
    for name, device in (("ada", ada), ("bob", bob)):
        answer(DeviceLedger(device.storage()), ROUNDS, run=name)
    shutil.rmtree(tmp_path / "bob/device")
    shutil.copytree(tmp_path / "ada/device", tmp_path / "bob/device")
    refused(bob, "brought from elsewhere")
    head = ada.head()
    bob.put_head(head)  # and its head with it, but not its marker
    (tmp_path / "bob/device" / MARKER).write_text('{"ledger": "bob", "head": "x"}')
    not_charged(bob, "brought from elsewhere")
    shutil.copytree(tmp_path / "ada/device", tmp_path / "elsewhere/device")
    refused(KeptFiles(tmp_path / "elsewhere"), "head is missing")
    answer(DeviceLedger(ada.storage()), ROUNDS, run="ada")  # its owner is not harmed


def test_a_backup_of_the_store_is_found_to_be_older(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path)
    for number in range(1, 4):
        made = replace(FIRST, round=number)
        DeviceLedger(kept.storage()).reserve(made, free)
        DeviceLedger(kept.storage()).seal(made, b"reply")
        shutil.copytree(tmp_path / "device", tmp_path / f"backup-{number}")
    for number in (1, 2, 3):
        shutil.rmtree(tmp_path / "device")
        shutil.copytree(tmp_path / f"backup-{number}", tmp_path / "device")
        if number < 3:
            refused(kept, "rolled back")
    assert len(DeviceLedger(kept.storage()).entries()) == 3


@pytest.fixture
def whole(tmp_path: Path) -> dict[Path, bytes]:
    """Journal and head of a device that answered one round."""
    answer(DeviceLedger(KeptFiles(tmp_path).storage()), 1)
    return {file: file.read_bytes() for file in (tmp_path / "device" / JOURNAL, tmp_path / "device.heads" / JOURNAL)}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(whole: dict[Path, bytes], at: int, bit: int) -> None:
    """Wherever it is: in the journal it breaks a link or what the head says, in the head it breaks that."""
    places = [(file, place) for file, data in whole.items() for place in range(len(data))]
    file, place = places[at % len(places)]
    damaged = bytearray(whole[file])
    damaged[place] ^= 1 << bit
    file.write_bytes(damaged)
    with pytest.raises(AntherError):
        DeviceLedger(FileStorage(file.parent.with_name("device"))).entries()
    for every, data in whole.items():
        every.write_bytes(data)


@pytest.mark.parametrize("form", FORMS)
def test_processes_at_once_keep_one_chain(form: type[KeptFiles], tmp_path: Path) -> None:
    """They enrol at once, too."""
    kept, children = form(tmp_path), []
    for child in range(4):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                ledger = DeviceLedger(form(tmp_path).storage())
                for number in range(1, 6):
                    made = replace(FIRST, run=f"run {child}", round=number)
                    ledger.reserve(made, free)
                    ledger.seal(made, str(child).encode())
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    history = DeviceLedger(kept.storage()).history()
    assert history.events == len(kept.lines()) == 1 + 4 * 5 * 2
    assert [entry.state for entry in history.entries.values()] == [SEALED] * 20


def test_set_aside_it_can_be_brought_back(tmp_path: Path) -> None:
    kept, files = KeptFiles(tmp_path), FileStorage(tmp_path / "device")
    answer(DeviceLedger(files), ROUNDS)
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


def test_there_may_be_nothing_to_set_aside(tmp_path: Path) -> None:
    assert FileStorage(tmp_path / "device").set_aside(JOURNAL, OUTBOX, MARKER) is None
    assert not (tmp_path / "device").exists()


def test_who_waits_for_a_ledger_that_is_set_aside_writes_into_the_new_one(tmp_path: Path) -> None:
    files = FileStorage(tmp_path / "device")
    answer(DeviceLedger(files), 1)
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
