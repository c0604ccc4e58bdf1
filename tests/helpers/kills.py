"""Kill what is done on a disk at every durable step of it: a fork that counts its own calls, and ends itself."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = (
    "write",
    "pwrite",
    "fsync",
    "replace",
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "ftruncate",
    "symlink",
)


def in_child(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Run in a fork, which is killed after so many seconds; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except Exception:
            traceback.print_exc()  # nobody else would tell of it
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted(work: Callable[[], None], trace: Path) -> list[str]:
    """Which durable calls it makes when nobody kills it; done in a fork."""
    assert in_child(lambda: _until(-1, work, trace)) == 0
    return trace.read_text().split()


def killed_before(call: int, work: Callable[[], None]) -> None:
    """Do it in a fork that is killed before its n-th durable call."""
    assert in_child(lambda: _until(call, work, None)) == -signal.SIGKILL


def _until(call: int, work: Callable[[], None], trace: Path | None) -> None:
    calls: list[str] = []

    def wrapped(name: str, durable: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            return durable(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    work()
    if trace:
        trace.write_text(" ".join(calls))
