"""Folders that one pytest worker makes and all workers of a run read."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def shared_folder(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Make a folder once per run of pytest; workers that come later wait for it.

    Args:
        factory: gives the temporary folders of this worker, inside that of the run.
        name: name of the folder.
        make: fills the new folder, at its final path.

    Returns:
        The folder, which tests must not change.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with (root / f"{name}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            shutil.rmtree(folder, ignore_errors=True)  # left by a failure
            folder.mkdir()
            make(folder)
            lock.write("complete")
    return folder
