"""Kill the device at every durable step of a round, and at random: charged ≥ released, and one reply per round.

The child is a fork that is killed by SIGKILL: by itself before or within its n-th write, fsync, rename or removal, or
by its parent at a random time. Replies that it managed to send are recorded in the file `wire` next to the store; the
server's echo is derived from it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from client.device import Device
from client.rounds.handler import handle
from client.rounds.helpers import cache_key
from client.rounds.scheduler import run_handlers
from client.rounds.train import _identity, _unpack
from client.store.layout import is_plaintext
from common.errors import AntherError
from models.base.base import Base
from models.lora.adapter import init_adapter
from privacy.encrypted_storage import EncryptedStorage, StoreCipher
from privacy.ledger.ledger import JOURNAL, RESERVED, SEALED, SENT, TRAIN, DeviceLedger
from privacy.storage import FileStorage, Storage
from protocol.messages import Train, Update
from tests.helpers.devices import Performer, cache_epsilon, make_device, to_bytes, train_request
from tests.helpers.kills import in_child
from tests.helpers.samples import sampled
from training import jobs
from training.engine import perform as really_perform

pytestmark = pytest.mark.integration

ROUNDS = 2
COUNTED = ("write", "fsync", "replace", "unlink", "mkdir", "ftruncate")


@dataclass
class DeviceProcess:
    """A device in a folder that serves a server whose state is in files beside the store."""

    folder: Path
    perform: Callable[[list[jobs.Job]], Sequence[jobs.Result | Exception]]
    pause: float = 0.0

    def storage(self) -> Storage:
        return FileStorage(self.folder / "store")

    def device(self) -> Device:
        return make_device(self.storage())

    def request(self, number: int) -> Train:
        return train_request(number=number)

    def serve(self) -> None:
        """Answer every round and send each reply; after a crash the last requested round is requested again."""
        device = self.device()
        requested = self.folder / "asked"  # one byte per requested round
        last = requested.stat().st_size if requested.exists() else 0
        for number in range(max(1, last), ROUNDS + 1):
            append(requested, bytes(number - last))
            last = number
            echo = max((sent.events for sent in read_wire(self.folder)), default=0)
            request = replace(self.request(number), echo=echo)
            reply = run_handlers({0: handle(request, device)}, self._perform_recorded)[0]
            time.sleep(self.pause)
            assert isinstance(reply, Update), reply
            append(self.folder / "wire", f"{number} {reply.events} {digest(reply)}\n".encode())

    def _perform_recorded(self, batch: list[jobs.Job]) -> Sequence[jobs.Result | Exception]:
        for job in batch:
            if isinstance(job, jobs.TrainJob):
                append(self.folder / "performed", f"{job.round}\n".encode())
        return self.perform(batch)


@dataclass
class EncryptedDeviceProcess(DeviceProcess):
    """A device whose store is encrypted."""

    def storage(self) -> Storage:
        return EncryptedStorage(FileStorage(self.folder / "store"), StoreCipher(bytes(32), "s"), is_plaintext)


@dataclass
class TrainingDeviceProcess(DeviceProcess):
    """A device that really trains, on a tiny base."""

    base: Base | None = None

    def device(self) -> Device:
        assert self.base
        created = super().device()
        return replace(created, sites=self.base.sites, report=replace(created.report, base=self.base.hash))

    def request(self, number: int) -> Train:
        assert self.base
        request = super().request(number)
        sent = to_bytes(init_adapter(self.base.sites, 3, seed=number))
        return replace(request, plan=replace(request.plan, base=self.base.hash), adapter=sent)


@dataclass(frozen=True)
class SentReply:
    number: int
    events: int
    digest: str


def append(file: Path, data: bytes) -> None:
    """Append in one system call, so that a kill leaves all of it or nothing."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, data)
    os.close(handle)


def digest(reply: Update) -> str:
    return hashlib.sha256(repr(reply).encode()).hexdigest()


def read_wire(folder: Path) -> list[SentReply]:
    wire = folder / "wire"
    lines = [line.split() for line in wire.read_text().splitlines()] if wire.exists() else []
    return [SentReply(int(number), int(events), result) for number, events, result in lines]


def serve_until(call: int, process: DeviceProcess, *, within: bool = False, trace: Path | None = None) -> None:
    """Serve, and die before the given durable call, or within it if it writes a line of the journal.

    Other writes go to temporary files, which have no effect before their rename. If the process survives, the calls are
    written to `trace`.

    Args:
        call: index of the durable call.
        process: the device to run.
        within: die half-way through the call.
        trace: file for the names of all durable calls.
    """
    calls: list[str] = []

    def counting(name: str, durable: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == call:
                if within and name == "write" and args[1].startswith((b"{", b"~")):
                    durable(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            return durable(*args, **kwargs)

        return wrapper

    for name in COUNTED:
        setattr(os, name, counting(name, getattr(os, name)))
    process.serve()
    if trace:
        trace.write_text(" ".join(calls))


def durable_calls(process: DeviceProcess) -> list[str]:
    """List the durable calls of a run without a crash."""
    trace = process.folder.with_name("trace")
    assert in_child(partial(serve_until, -1, process, trace=trace)) == 0
    return trace.read_text().split()


def check(process: DeviceProcess) -> None:
    """Check the invariants that must hold after any crash, and that the ledger can be read.

    No crash may make a healthy device look rolled back.
    """
    folder = process.folder
    ledger = DeviceLedger(process.storage())
    history = ledger.history()
    entries = {entry.reservation.round: entry for entry in history.entries.values()}
    performed = folder / "performed"
    for number in performed.read_text().split() if performed.exists() else ():
        assert int(number) in entries, "performed without a charge"
    released: dict[int, set[str]] = {}
    for sent in read_wire(folder):
        released.setdefault(sent.number, set()).add(sent.digest)
        assert sent.events <= history.events, "the server knows more events than the ledger has"
    assert len(released) <= len(entries), "released without a charge"
    for number, entry in entries.items():
        replies = released.get(number, set())
        if entry.state == RESERVED:
            assert not replies, "released without a seal"
        elif entry.state == SEALED:  # a reply sent now equals the one sent before
            plan = process.request(number).plan
            repeated = ledger.sealed((plan.run, number, TRAIN), _identity(plan))
            assert repeated is not None
            replies = replies | {digest(_unpack(repeated))}
        assert len(replies) <= 1, f"round {number} was released {len(replies)} times"


def states(process: DeviceProcess) -> list[str]:
    return [entry.state for entry in DeviceLedger(process.storage()).entries()]


def finish(process: DeviceProcess) -> None:
    """Restart: the process continues to the end and charges each round once."""
    assert in_child(process.serve) == 0
    check(process)
    assert {sent.number for sent in read_wire(process.folder)} == set(range(1, ROUNDS + 1))
    assert len(states(process)) == ROUNDS


SAMPLES = [(DeviceProcess, 4), (EncryptedDeviceProcess, 4)]


@pytest.fixture(autouse=True, scope="module")
def _epsilon_is_known() -> None:
    cache_epsilon(ROUNDS)


@pytest.mark.parametrize(
    ("kind", "every"),
    sampled([(kind, every) for kind in (DeviceProcess, EncryptedDeviceProcess) for every in (4, 1)], SAMPLES),
)
def test_kill_at_every_durable_step(kind: type[DeviceProcess], every: int, tmp_path: Path) -> None:
    observed = set()
    calls = durable_calls(new_process(tmp_path / "whole", kind))
    points = [
        (call, within) for call, name in enumerate(calls) for within in ((False, True) if name == "write" else (False,))
    ]
    for call, within in points[::every]:
        process = new_process(tmp_path / f"{call}-{within}", kind)
        assert in_child(partial(serve_until, call, process, within=within)) == -signal.SIGKILL
        check(process)
        observed |= set(states(process))
        finish(process)
    assert observed == {RESERVED, SEALED, SENT}
    assert len(points) > 40


def new_process(folder: Path, kind: type[DeviceProcess] = DeviceProcess) -> DeviceProcess:
    folder.mkdir()
    return kind(folder, Performer())


def test_restored_backup_is_refused(tmp_path: Path) -> None:
    """Restore a backup from before or after any durable step of a device that then continued."""
    refused = stored = 0
    calls = durable_calls(new_process(tmp_path / "whole"))
    for call in range(0, len(calls), 5):
        process = new_process(tmp_path / str(call))
        in_child(partial(serve_until, call, process))
        if not (process.folder / "store").exists():
            continue
        shutil.copytree(process.folder / "store", process.folder / "backup")
        finish(process)
        final = (process.folder / "store" / JOURNAL).read_bytes()
        shutil.rmtree(process.folder / "store")
        (process.folder / "backup").rename(process.folder / "store")
        if (process.folder / "store" / JOURNAL).exists() and (process.folder / "store" / JOURNAL).read_bytes() == final:
            stored += 1
            check(process)
            continue
        with pytest.raises(AntherError, match=r"rolled back|is missing"):
            DeviceLedger(FileStorage(process.folder / "store")).entries()
        refused += 1
    assert refused > 5
    assert stored


def kills(process_in: Callable[[Path], DeviceProcess], folder: Path, *, points: int, seed: int) -> Mapping[str, int]:
    """Kill devices at random, one to three times each before they finish; count kills and states.

    Args:
        process_in: creates a device in a folder.
        folder: folder for all devices.
        points: number of kills.
        seed: seed of the random kills.
    """
    rng, table = random.Random(seed), {"at a call": 0, "at a moment": 0, RESERVED: 0, SEALED: 0, SENT: 0}
    whole = process_in(folder / "whole")
    started = time.perf_counter()
    calls = len(durable_calls(whole))
    seconds = time.perf_counter() - started
    check(whole)
    for number in itertools.count():
        process = process_in(folder / str(number))
        for _ in range(rng.randint(1, 3)):
            if by_call := rng.random() < 0.5:
                status = in_child(partial(serve_until, rng.randrange(calls), process, within=rng.random() < 0.5))
            else:
                status = in_child(process.serve, kill_after=rng.uniform(0, 1.1 * seconds))
            assert status in (0, -signal.SIGKILL)
            check(process)
            table["at a call" if by_call else "at a moment"] += status != 0
            for state in set(states(process)):
                table[state] += status != 0
        finish(process)
        if table["at a call"] + table["at a moment"] >= points:
            return table
    raise AssertionError


@pytest.fixture
def process_in(base: Base) -> Callable[[Path], DeviceProcess]:
    """Create devices that really train, with their pictures already encoded."""
    work = partial(really_perform, base, memory=1 << 30, timesteps=2)

    def create(folder: Path) -> DeviceProcess:
        folder.mkdir()
        process = TrainingDeviceProcess(folder, work, base=base)
        device = process.device()
        device.store.save_examples("train", cache_key(device, device.pictures().train), examples)
        return process

    pictures = make_device(Path()).pictures().train
    (examples,) = work([jobs.EncodeJob(pictures=pictures)])
    assert isinstance(examples, jobs.Examples)
    return create


def test_random_kills_of_real_rounds(process_in: Callable[[Path], DeviceProcess], tmp_path: Path) -> None:
    print(kills(process_in, tmp_path, points=4, seed=0))


@pytest.mark.stress
def test_two_hundred_random_kills(process_in: Callable[[Path], DeviceProcess], tmp_path: Path) -> None:
    """Print the full table: `python -m pytest -m stress -s tests/client/rounds/test_crash.py`."""
    table = kills(process_in, tmp_path, points=200, seed=1)
    print(table)
    assert min(table.values()) > 20
