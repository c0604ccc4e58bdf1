"""Atomic, durable writes: files that survive a power failure. The privacy ledger's guarantees depend on them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def make_folder(path: Path) -> None:
    """Create a folder that only its owner can access, with its parents, durably."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path.parent)


def write(path: Path, data: bytes) -> None:
    """Replace a file's content atomically: a crash leaves the old content or the new, never a mixture."""
    make_folder(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: fsync of a file makes its content durable, not its name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
