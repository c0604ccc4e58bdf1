"""Kill disk operations at every durable step: a fork counts its own calls and kills itself."""

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
    """Run in a fork, which is killed after this many seconds; return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except Exception:
            traceback.print_exc()  # otherwise the error would be lost
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def durable_calls(work: Callable[[], None], trace: Path) -> list[str]:
    """List the durable calls of a run without a kill, in a fork."""
    assert in_child(lambda: _until(-1, work, trace)) == 0
    return trace.read_text().split()


def killed_before(call: int, work: Callable[[], None]) -> None:
    """Run in a fork that is killed before its n-th durable call."""
    assert in_child(lambda: _until(call, work, None)) == -signal.SIGKILL


def _until(call: int, work: Callable[[], None], trace: Path | None) -> None:
    calls: list[str] = []

    def counting(name: str, durable: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            return durable(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counting(name, getattr(os, name)))
    work()
    if trace:
        trace.write_text(" ".join(calls))
