"""Kill a whole fleet at every statement of its database, at every kind of byte of a commit, and at random.

For each device, performed jobs were charged before, and only sealed replies were returned.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import resource
import signal
import sqlite3
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from privacy.ledger.ledger import RESERVED, SEALED, SENT, DeviceLedger, LedgerEntry
from protocol import records
from protocol.messages import Update
from simulations.fleet.storage import FILE, Database
from simulations.grid.cohort import CohortGrid
from tests.client.rounds.test_crash import append, in_child
from tests.helpers.devices import Performer, cache_epsilon, make_device, train_request
from training import jobs

ROUNDS, NAMES = 2, ("a", "b", "c")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class CrashingFleet:
    """Fleet that answers every round, records performed jobs and returned replies in files, and counts kill points."""

    def __init__(self, folder: Path, kill_at: int | None = None) -> None:
        self.folder, self._kill_at, self._step = folder, kill_at, 0
        if kill_at is not None:
            connect = sqlite3.connect
            sqlite3.connect = lambda *args, **kwargs: self._watched(connect(*args, **kwargs))  # type: ignore[assignment]
        database = Database(folder / FILE)
        devices = [make_device(database.device(name), name=name) for name in NAMES]
        self.grid = CohortGrid(devices, self.perform, group_commit=database.group_commit)

    def serve(self) -> None:
        requested = self.folder / "asked"  # one byte per requested round; after a crash the last is requested again
        before = requested.stat().st_size if requested.exists() else 0
        for number in range(max(1, before), ROUNDS + 1):
            append(requested, bytes(number - before))
            before = number
            content = records.request_to_records(train_request(number=number))
            for reply in self.grid.send_and_receive([Message(content, node, "train") for node in (1, 2, 3)]):
                assert reply.has_content(), reply.error
                update = records.reply_from_records("train", reply.content)
                assert isinstance(update, Update)
                self._count_step()
                digest = hashlib.sha256(repr(update).encode()).hexdigest()
                append(self.folder / "wire", f"{update.device} {number} {digest}\n".encode())

    def perform(self, asked: list[jobs.Job]) -> Sequence[jobs.Result | Exception]:
        for job in asked:
            if isinstance(job, jobs.TrainJob):
                self._count_step()
                append(self.folder / "performed", f"{job.client} {job.round}\n".encode())
        return Performer()(asked)

    def _watched(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        connection.set_trace_callback(lambda _: self._count_step())
        return connection

    def _count_step(self) -> None:
        if self._step == self._kill_at:
            kill()
        self._step += 1


def read(file: Path) -> list[list[str]]:
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def ledgers(folder: Path) -> dict[tuple[str, int], LedgerEntry]:
    database = Database(folder / FILE)
    entries = {(name, entry.reservation.round): entry for name in NAMES for entry in _entries(database, name)}
    database.close()
    return entries


def _entries(database: Database, name: str) -> tuple[LedgerEntry, ...]:
    return DeviceLedger(database.device(name)).entries()


def check(folder: Path) -> dict[tuple[str, int], LedgerEntry]:
    """Check the invariants that hold after any crash, and return the ledgers' entries."""
    entries = ledgers(folder)
    for name, number in read(folder / "performed"):
        assert (name, int(number)) in entries, "performed without a charge"
    sent: dict[tuple[str, int], set[str]] = {}
    for name, number, digest in read(folder / "wire"):
        sent.setdefault((name, int(number)), set()).add(digest)
    for key, replies in sent.items():
        assert len(replies) == 1, f"{key} was released {len(replies)} times"
        assert entries[key].state in (SEALED, SENT), "released without a seal"
    return entries


def finish(folder: Path) -> None:
    """Check that the next start completes all rounds and charges each once."""
    assert in_child(lambda: CrashingFleet(folder).serve()) == 0
    assert set(check(folder)) == set(itertools.product(NAMES, range(1, ROUNDS + 1)))
    assert {(name, int(number)) for name, number, _ in read(folder / "wire")} == set(ledgers(folder))


@pytest.fixture(autouse=True, scope="module")
def _epsilon_is_known() -> None:
    cache_epsilon(ROUNDS)


@pytest.mark.integration
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.stress)])
def test_a_kill_at_every_statement(every: int, tmp_path: Path) -> None:
    states_by_step, seen = [], set()
    for step in itertools.count(step=every):
        folder = tmp_path / str(step)
        folder.mkdir()
        status = in_child(lambda folder=folder, step=step: CrashingFleet(folder, kill_at=step).serve())  # type: ignore[misc]
        if status == 0:  # there are no more steps
            break
        assert status == -signal.SIGKILL
        entries = check(folder)
        states_by_step.append({number: [e.state for (_, n), e in entries.items() if n == number] for number in (1, 2)})
        seen |= {entry.state for entry in entries.values()}
        if len(states_by_step) % 5 == 0:
            finish(folder)
    assert step > 60
    assert seen == {RESERVED, SEALED, SENT}
    # The reservations of a round are one transaction, and so are its seals: all devices are in the same state.
    assert all(
        len(set(states)) <= 1 and len(states) in (0, 3) for by_round in states_by_step for states in by_round.values()
    )


@pytest.mark.integration
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.stress)])
def test_a_kill_within_a_commit(every: int, tmp_path: Path) -> None:
    """Kill at the byte that exceeds a limit on file sizes, in the database or in its rollback journal.

    The journal starts with a sector of 512 bytes and has a number before and after each page.
    """

    def serve_up_to(size: int, folder: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        CrashingFleet(folder).serve()

    page, killed = 65536, 0
    places = list(itertools.product(range(6), (0, 1, 28, 512, 516, 524, 5000, page - 1)))
    for pages, beside in places[::every]:
        folder = tmp_path / f"{pages}-{beside}"
        folder.mkdir()
        status = in_child(partial(serve_up_to, pages * page + beside, folder))
        assert status in (0, -signal.SIGXFSZ)
        killed += status != 0
        check(folder)
        if beside in (1, 5000):
            finish(folder)
    assert killed > 30 / every


@pytest.mark.integration
def test_kills_at_random_times(tmp_path: Path) -> None:
    generator = random.Random(0)

    def serve_for(seconds: float) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process wherever it is
        signal.setitimer(signal.ITIMER_REAL, seconds)
        CrashingFleet(tmp_path).serve()

    for _ in range(12):
        in_child(partial(serve_for, generator.uniform(0.001, 0.1)))
        check(tmp_path)
    finish(tmp_path)


@pytest.mark.integration
def test_without_the_commits_the_checks_fail(tmp_path: Path) -> None:
    """A fleet that performs jobs before it commits is detected."""

    class UncommittedFleet(CrashingFleet):
        def __init__(self, folder: Path, kill_at: int) -> None:
            super().__init__(folder, kill_at)
            self.grid._group_commit = _uncommitted(self.grid._group_commit)  # type: ignore[assignment]

    def caught(step: int) -> bool:
        folder = tmp_path / str(step)
        folder.mkdir()
        in_child(lambda: UncommittedFleet(folder, kill_at=step).serve())
        try:
            check(folder)
        except AssertionError as error:
            return "performed without a charge" in str(error)
        return False

    assert any(caught(step) for step in range(20, 120, 2))


def _uncommitted(group_commit: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def storage() -> Any:
        with group_commit():
            yield lambda: None

    return storage
