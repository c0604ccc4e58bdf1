"""Child processes that run our own modules, independent of the working directory, and end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def python(module: str, *words: str) -> list[str]:
    """Return the command that runs one of our modules, and never one of that name in the working directory (`-P`)."""
    return [sys.executable, "-P", "-m", module, *words]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return variables for a child process: ours, a path on which our modules are found, and `changes`."""
    variables = {**os.environ, "PYTHONSAFEPATH": "1"}
    root = Path(__file__).parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # a checkout is not on Python's path
        others = [part for part in variables.get("PYTHONPATH", "").split(os.pathsep) if part]
        variables["PYTHONPATH"] = os.pathsep.join([str(root), *(part for part in others if part != str(root))])
    return {**variables, **(changes or {})}


def end_with_parent() -> None:
    """Make the kernel end this process when its parent dies. Has no effect on other systems than Linux.

    Called in the child, after its fork.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died in between
        os.kill(os.getpid(), signal.SIGTERM)
