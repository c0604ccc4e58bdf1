"""Storage of one device: blobs by name, and append-only journals.

The ledger's guarantees require that no effect depends on a write before the write is durable. With `FileStorage`, a
write is durable when the call returns. The storage of a simulated fleet may wait for one commit of many devices, which
the driver makes before it runs their jobs and before it returns their replies.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Protocol

from common import atomic_files

ASIDE, HEAD = "forgotten", "head"


class Journal(Protocol):
    """Locked journal."""

    @property
    def lines(self) -> Sequence[bytes]:
        """Complete lines at the time of locking, oldest first, without line ends."""
        ...

    @property
    def head(self) -> bytes | None:
        """Head that was last stored outside of the device's storage; None if it is missing."""
        ...

    @property
    def head_location(self) -> str:
        """Location of the head, for messages."""
        ...

    def append(self, line: bytes) -> None:
        """Append a line, completely or not at all."""
        ...

    def write_head(self, head: bytes) -> None:
        """Replace the head atomically, once the lines are durable."""
        ...


class Storage(Protocol):
    """Storage of one device. Names are relative paths, chosen by the device's own code only."""

    def read(self, name: str) -> bytes | None:
        """Return a blob; None if it doesn't exist."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replace a blob atomically: a crash leaves the old content or the new, never a mixture."""
        ...

    def remove(self, name: str) -> None:
        """Remove a blob if it exists."""
        ...

    def journal(self, name: str) -> AbstractContextManager[Journal]:
        """Open a journal under an exclusive lock, also against other processes. Other callers wait."""
        ...

    def where(self, name: str) -> str:
        """Return the location of a blob or journal, for messages."""
        ...


class FileStorage:
    """Storage in the files of `folder`, where each write is synced.

    Args:
        folder: the device's folder.
        heads: folder for the heads of its journals. By default it is next to `folder`, not in it, so that restoring,
            cloning or deleting one doesn't include the other.
    """

    def __init__(self, folder: str | Path, *, heads: Path | None = None) -> None:
        self.folder = Path(folder).expanduser()
        absolute = self.folder.absolute()
        self.heads = heads or absolute.with_name(f"{absolute.name}.heads")

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        atomic_files.write(self.folder / name, data)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def journal(self, name: str) -> Iterator[Journal]:
        path = self.folder / name
        atomic_files.make_folder(path.parent)
        handle = _open_locked(path)
        try:
            yield _FileJournal(handle, _complete_lines(path, handle), self.heads / name)
        finally:
            os.close(handle)  # also unlocks

    def set_aside(self, journal: str, *beside: str) -> Path | None:
        """Move a journal, the given files next to it and finally its head into a new folder, under the journal's lock.

        A crash in between leaves a head without a journal; calling it again continues.

        Returns:
            The new folder, or None if there is nothing to move.
        """
        moves = [(self.folder / name, name) for name in (journal, *beside)] + [(self.heads / journal, HEAD)]
        if not any(path.exists() for path, _ in moves):
            return None
        with self.journal(journal):
            numbers = (f"{ASIDE}-{number}" for number in count(1))
            aside = next(self.folder / name for name in numbers if not (self.folder / name).exists())
            atomic_files.make_folder(aside)
            for path, name in moves:
                if path.exists():
                    atomic_files.make_folder((aside / name).parent)
                    path.rename(aside / name)
                    atomic_files.sync_folder((aside / name).parent)
                    atomic_files.sync_folder(path.parent)
        return aside

    def where(self, name: str) -> str:
        return str(self.folder / name)


class _FileJournal:
    def __init__(self, handle: int, lines: Sequence[bytes], head: Path) -> None:
        self._handle, self.lines, self._head = handle, lines, head
        self._synced = False

    @property
    def head(self) -> bytes | None:
        try:
            return self._head.read_bytes()
        except FileNotFoundError:
            return None

    @property
    def head_location(self) -> str:
        return str(self._head)

    def append(self, line: bytes) -> None:
        complete = line + b"\n"
        if os.write(self._handle, complete) < len(complete):
            raise OSError("the disk is full: the journal's line was cut short")
        self._sync()

    def write_head(self, head: bytes) -> None:
        if not self._synced:
            self._sync()  # a line of a process that was killed may not be durable yet
        atomic_files.write(self._head, head)

    def _sync(self) -> None:
        os.fsync(self._handle)
        self._synced = True


def _open_locked(path: Path) -> int:
    """Open a journal and lock it; try again if it was set aside while waiting for the lock."""
    while True:
        is_new = not path.exists()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                if is_new:
                    atomic_files.sync_folder(path.parent)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _complete_lines(path: Path, handle: int) -> list[bytes]:
    """Return complete lines, and remove a torn last line, on which nothing depends yet."""
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if len(complete) < len(data):
        os.ftruncate(handle, len(complete))
        os.fsync(handle)
    return complete.splitlines()
