"""One owner at a time: a lock on a folder that is held for the life of whoever took it, and falls with its process."""

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
    """Within this context nobody else has the folder, in this process or another.

    The file stays when the lock is let go of: two who made it anew could both hold one of it. It holds the process id
    of whoever took it last.

    Args:
        what: is being locked, for the message: "the store".

    Raises:
        AntherError: somebody has it, or the disk knows no locks.
    """
    path = folder / FILE
    try:
        atomic_files.make_folder(folder)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise AntherError(f"{path}: can't be made ({error.strerror}): free or mend the disk") from error
    try:
        _take(handle, path, what)
        yield
    finally:
        os.close(handle)  # and unlock


def _take(handle: int, path: Path, what: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
        who = f"process {holder}" if holder.isdecimal() else "another process"
        raise AntherError(f"{path.parent}: {what} is in use by {who}: wait for it, or stop it first") from None
    except OSError as error:
        raise AntherError(
            f"{path}: can't be locked ({error.strerror}): {what} needs a disk that knows locks"
        ) from error
    with suppress(OSError):  # a full disk keeps no number; the lock holds all the same
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
