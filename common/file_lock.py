"""Exclusive lock on a folder, released when its holder's process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common import atomic_files
from common.errors import AntherError

FILE = "lock"


@contextmanager
def exclusive(folder: Path, *, what: str) -> Iterator[None]:
    """Lock a folder exclusively within this context, also against other processes.

    The lock file is not deleted when the lock is released: if it were created again, two processes could each lock a
    different file. It contains the process id of the last holder.

    Args:
        folder: the folder.
        what: name of the locked resource, for the message, e.g. "the store".

    Raises:
        AntherError: another holder has it, or the file system doesn't support locks.
    """
    path = folder / FILE
    try:
        atomic_files.make_folder(folder)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise AntherError(f"{path}: can't be created ({error.strerror}): free or repair the disk") from error
    try:
        _take(handle, path, what)
        yield
    finally:
        os.close(handle)  # also unlocks


def holder(folder: Path) -> int | None:
    """Return the process that holds the lock of a folder; None if it is free, 0 if the process is unknown."""
    try:
        handle = os.open(folder / FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        number = os.pread(handle, 20, 0).decode(errors="replace").strip()
        return int(number) if number.isdecimal() else 0
    except OSError:
        return None
    finally:
        os.close(handle)  # also unlocks
    return None


def _take(handle: int, path: Path, what: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
        who = f"process {holder}" if holder.isdecimal() else "another process"
        raise AntherError(f"{path.parent}: {what} is in use by {who}: wait for it, or stop it first") from None
    except OSError as error:
        raise AntherError(
            f"{path}: can't be locked ({error.strerror}): {what} needs a file system with locks"
        ) from error
    with suppress(OSError):  # on a full disk the process id is missing; the lock is effective
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
