"""Kill the device at every durable step of a round, and at random: charged ≥ released, and one reply a round.

The child is a fork that is killed by SIGKILL: by itself before or within its n-th write, fsync, rename or removal, or
by its parent at a random moment. What it managed to send lies on the wire, a file beside the store; the server's echo
is what the wire says.
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
from tests.helpers.devices import Performer, know_epsilon, make_device, to_bytes, train_request
from tests.helpers.kills import in_child
from training import jobs
from training.engine import perform as really_perform

ROUNDS = 2
COUNTED = ("write", "fsync", "replace", "unlink", "mkdir", "ftruncate")


@dataclass
class Life:
    """A device in a folder, answering a server that keeps what it hears in files beside it."""

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
        """Answer every round and send each reply; after a crash the round last asked for is asked for again."""
        device = self.device()
        asked = self.folder / "asked"  # as many bytes as rounds
        before = asked.stat().st_size if asked.exists() else 0
        for number in range(max(1, before), ROUNDS + 1):
            append(asked, bytes(number - before))
            before = number
            echo = max((sent.events for sent in read_wire(self.folder)), default=0)
            request = replace(self.request(number), echo=echo)
            reply = run_handlers({0: handle(request, device)}, self._noted)[0]
            time.sleep(self.pause)
            assert isinstance(reply, Update), reply
            append(self.folder / "wire", f"{number} {reply.events} {digest(reply)}\n".encode())

    def _noted(self, asked: list[jobs.Job]) -> Sequence[jobs.Result | Exception]:
        for job in asked:
            if isinstance(job, jobs.TrainJob):
                append(self.folder / "performed", f"{job.round}\n".encode())
        return self.perform(asked)


@dataclass
class SealedLife(Life):
    """The same with its store encrypted."""

    def storage(self) -> Storage:
        return EncryptedStorage(FileStorage(self.folder / "store"), StoreCipher(bytes(32), "s"), is_plaintext)


@dataclass
class RealLife(Life):
    """The same with real training, on a tiny base."""

    base: Base | None = None

    def device(self) -> Device:
        assert self.base
        made = super().device()
        return replace(made, sites=self.base.sites, report=replace(made.report, base=self.base.hash))

    def request(self, number: int) -> Train:
        assert self.base
        request = super().request(number)
        sent = to_bytes(init_adapter(self.base.sites, 3, seed=number))
        return replace(request, plan=replace(request.plan, base=self.base.hash), adapter=sent)


@dataclass(frozen=True)
class Sent:
    number: int
    events: int
    digest: str


def append(file: Path, data: bytes) -> None:
    """In one system call, so that a kill leaves all of it or nothing."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, data)
    os.close(handle)


def digest(reply: Update) -> str:
    return hashlib.sha256(repr(reply).encode()).hexdigest()


def read_wire(folder: Path) -> list[Sent]:
    wire = folder / "wire"
    lines = [line.split() for line in wire.read_text().splitlines()] if wire.exists() else []
    return [Sent(int(number), int(events), found) for number, events, found in lines]


def serve_until(call: int, life: Life, *, within: bool = False, trace: Path | None = None) -> None:
    """Serve, and die before the given durable call, or within it where it writes a line of the journal.

    The other writes are a blob's, which nobody knows before its rename. At the end note which calls there were.
    """
    calls: list[str] = []

    def counted(name: str, durable: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == call:
                if within and name == "write" and args[1].startswith((b"{", b"~")):
                    durable(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            return durable(*args, **kwargs)

        return wrapper

    for name in COUNTED:
        setattr(os, name, counted(name, getattr(os, name)))
    life.serve()
    if trace:
        trace.write_text(" ".join(calls))


def durable_calls(life: Life) -> list[str]:
    """What it does to serve without a crash."""
    trace = life.folder.with_name("trace")
    assert in_child(partial(serve_until, -1, life, trace=trace)) == 0
    return trace.read_text().split()


def check(life: Life) -> None:
    """What must hold after any crash, and that the ledger can be read: no crash makes a healthy device suspicious."""
    folder = life.folder
    ledger = DeviceLedger(life.storage())
    history = ledger.history()
    entries = {entry.reservation.round: entry for entry in history.entries.values()}
    performed = folder / "performed"
    for number in performed.read_text().split() if performed.exists() else ():
        assert int(number) in entries, "performed without a charge"
    released: dict[int, set[str]] = {}
    for sent in read_wire(folder):
        released.setdefault(sent.number, set()).add(sent.digest)
        assert sent.events <= history.events, "the server was told of more than there is"
    assert len(released) <= len(entries), "released without a charge"
    for number, entry in entries.items():
        replies = released.get(number, set())
        if entry.state == RESERVED:
            assert not replies, "released without a seal"
        elif entry.state == SEALED:  # what would be sent now is what was sent
            plan = life.request(number).plan
            again = ledger.sealed((plan.run, number, TRAIN), _identity(plan))
            assert again is not None
            replies = replies | {digest(_unpack(again))}
        assert len(replies) <= 1, f"round {number} was released {len(replies)} times"


def states(life: Life) -> list[str]:
    return [entry.state for entry in DeviceLedger(life.storage()).entries()]


def finish(life: Life) -> None:
    """The next start carries on to the end and charges each round once."""
    assert in_child(life.serve) == 0
    check(life)
    assert {sent.number for sent in read_wire(life.folder)} == set(range(1, ROUNDS + 1))
    assert len(states(life)) == ROUNDS


@pytest.fixture(autouse=True, scope="module")
def _epsilon_is_known() -> None:
    know_epsilon(ROUNDS)


@pytest.mark.parametrize(
    ("kind", "every"), [(Life, 1), (SealedLife, 5), pytest.param(SealedLife, 1, marks=pytest.mark.slow)]
)
def test_a_kill_at_every_durable_step(kind: type[Life], every: int, tmp_path: Path) -> None:
    seen = set()
    calls = durable_calls(life_of_its_own(tmp_path / "whole", kind))
    points = [
        (call, within) for call, name in enumerate(calls) for within in ((False, True) if name == "write" else (False,))
    ]
    for call, within in points[::every]:
        life = life_of_its_own(tmp_path / f"{call}-{within}", kind)
        assert in_child(partial(serve_until, call, life, within=within)) == -signal.SIGKILL
        check(life)
        seen |= set(states(life))
        finish(life)
    assert seen == {RESERVED, SEALED, SENT}
    assert len(points) > 40


def life_of_its_own(folder: Path, kind: type[Life] = Life) -> Life:
    folder.mkdir()
    return kind(folder, Performer())


def test_an_earlier_state_of_the_store_is_refused_wherever_it_was_taken(tmp_path: Path) -> None:
    """A backup brought back: of before or after any durable step of a device that then went on."""
    refused = kept = 0
    calls = durable_calls(life_of_its_own(tmp_path / "whole"))
    for call in range(0, len(calls), 3):
        life = life_of_its_own(tmp_path / str(call))
        in_child(partial(serve_until, call, life))
        if not (life.folder / "store").exists():
            continue
        shutil.copytree(life.folder / "store", life.folder / "backup")
        finish(life)
        final = (life.folder / "store" / JOURNAL).read_bytes()
        shutil.rmtree(life.folder / "store")
        (life.folder / "backup").rename(life.folder / "store")
        if (life.folder / "store" / JOURNAL).exists() and (life.folder / "store" / JOURNAL).read_bytes() == final:
            kept += 1
            check(life)
            continue
        with pytest.raises(AntherError, match=r"rolled back|is missing"):
            DeviceLedger(FileStorage(life.folder / "store")).entries()
        refused += 1
    assert refused > 10
    assert kept


def kills(life_in: Callable[[Path], Life], folder: Path, *, points: int, seed: int) -> Mapping[str, int]:
    """A table of random kills, one to three in a row on each device before it is left to finish."""
    drawn, table = random.Random(seed), {"at a call": 0, "at a moment": 0, RESERVED: 0, SEALED: 0, SENT: 0}
    whole = life_in(folder / "whole")
    began = time.perf_counter()
    calls = len(durable_calls(whole))
    seconds = time.perf_counter() - began
    check(whole)
    for number in itertools.count():
        life = life_in(folder / str(number))
        for _ in range(drawn.randint(1, 3)):
            if by_call := drawn.random() < 0.5:
                status = in_child(partial(serve_until, drawn.randrange(calls), life, within=drawn.random() < 0.5))
            else:
                status = in_child(life.serve, kill_after=drawn.uniform(0, 1.1 * seconds))
            assert status in (0, -signal.SIGKILL)
            check(life)
            table["at a call" if by_call else "at a moment"] += status != 0
            for state in set(states(life)):
                table[state] += status != 0
        finish(life)
        if table["at a call"] + table["at a moment"] >= points:
            return table
    raise AssertionError


@pytest.fixture
def life_in(base: Base) -> Callable[[Path], Life]:
    """A device that trains in earnest, with its pictures already encoded."""
    work = partial(really_perform, base, memory=1 << 30, timesteps=2)

    def made(folder: Path) -> Life:
        folder.mkdir()
        life = RealLife(folder, work, base=base)
        device = life.device()
        device.store.save_examples("train", cache_key(device, device.pictures().train), examples)
        return life

    pictures = make_device(Path()).pictures().train
    (examples,) = work([jobs.EncodeJob(pictures=pictures)])
    assert isinstance(examples, jobs.Examples)
    return made


def test_kills_at_random_points_of_real_rounds(life_in: Callable[[Path], Life], tmp_path: Path) -> None:
    print(kills(life_in, tmp_path, points=10, seed=0))


@pytest.mark.slow
def test_two_hundred_kills_at_random_points_of_real_rounds(life_in: Callable[[Path], Life], tmp_path: Path) -> None:
    """The whole table: `python -m pytest -m slow -s tests/client/rounds/test_crash.py`."""
    table = kills(life_in, tmp_path, points=200, seed=1)
    print(table)
    assert min(table.values()) > 20
