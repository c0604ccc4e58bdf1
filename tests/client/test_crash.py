"""Kill the device at every durable step of a round, and at random: charged ≥ released, and one reply a round.

The child is a fork that kills itself with SIGKILL before or after its n-th write, fsync, rename or removal. What it
managed to send lies on the wire, a file beside the store.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from client.drive import drive
from client.logic import handle
from privacy.ledger import RESERVED, SEALED, SENT, Ledger
from privacy.storage import Files
from protocol.messages import Update
from tests.client.devices import Performer, know_epsilon, make_device, train_request

ROUNDS = 2
COUNTED = ("write", "fsync", "replace", "unlink")


def serve(folder: Path, pause: float = 0.0) -> None:
    """Answer every round and send each reply; after a crash the round last asked for is asked for again."""
    device, perform = make_device(folder / "store"), Performer()
    asked = folder / "asked"  # as many bytes as rounds
    before = asked.stat().st_size if asked.exists() else 0
    for number in range(max(1, before), ROUNDS + 1):
        append(asked, bytes(number - before))
        before = number
        reply = drive({0: handle(train_request(number=number), device)}, perform)[0]
        time.sleep(pause)
        assert isinstance(reply, Update), reply
        append(folder / "wire", f"{number} {hashlib.sha256(repr(reply).encode()).hexdigest()}\n".encode())


def append(file: Path, data: bytes) -> None:
    """In one system call, so that a kill leaves all of it or nothing."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, data)
    os.close(handle)


def read_wire(folder: Path) -> dict[int, set[str]]:
    """The different replies that were sent for each round."""
    sent: dict[int, set[str]] = {}
    wire = folder / "wire"
    for line in wire.read_text().splitlines() if wire.exists() else []:
        number, digest = line.split()
        sent.setdefault(int(number), set()).add(digest)
    return sent


def in_child(work: Callable[[], None]) -> int:
    """Run in a fork; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def serve_until(step: int, folder: Path) -> None:
    """Serve, and die at the given durable call: before it when `step` is even, after it when odd."""
    calls = iter(range(10**6))

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            number = next(calls)
            if number == step // 2 and step % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if number == step // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    for name in COUNTED:
        setattr(os, name, counted(getattr(os, name)))
    serve(folder)


def check(folder: Path) -> None:
    """What must hold after any crash."""
    entries = {entry.reservation.round: entry for entry in Ledger(Files(folder / "store")).entries()}
    for number, replies in read_wire(folder).items():
        assert len(replies) == 1, f"round {number} was released {len(replies)} times"
        assert entries[number].state in (SEALED, SENT), "released without a charge"


def finish(folder: Path) -> None:
    """The next start carries on to the end and charges each round once."""
    assert in_child(partial(serve, folder)) == 0
    check(folder)
    assert set(read_wire(folder)) == set(range(1, ROUNDS + 1))
    assert len(Ledger(Files(folder / "store")).entries()) == ROUNDS


@pytest.fixture(autouse=True, scope="module")
def _epsilon_is_known() -> None:
    know_epsilon(ROUNDS)


def test_a_kill_at_every_durable_step(tmp_path: Path) -> None:
    seen = set()
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        status = in_child(partial(serve_until, step, folder))
        if status == 0:  # there are no more steps
            break
        assert status == -signal.SIGKILL
        check(folder)
        seen |= {entry.state for entry in Ledger(Files(folder / "store")).entries()}
        finish(folder)
    assert seen == {RESERVED, SEALED, SENT}
    assert step >= 10


def test_kills_at_random_times(tmp_path: Path) -> None:
    drawn = random.Random(0)

    def serve_for(seconds: float) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process wherever it is
        signal.setitimer(signal.ITIMER_REAL, seconds)
        serve(tmp_path, pause=0.01)

    for _ in range(10):
        in_child(partial(serve_for, drawn.uniform(0.001, 0.08)))
        check(tmp_path)
    finish(tmp_path)
