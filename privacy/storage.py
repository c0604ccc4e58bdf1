"""Where one device keeps what it must not forget: blobs by name, and journals that only grow.

The ledger's promises rest on it. Nothing may be done on the strength of what was written before it is durable: with
`FileStorage` it is when the call returns; a simulated fleet's storage may wait for one commit of many devices, which whoever
drives them makes before it performs their jobs and before it hands out their replies.
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
    """A journal while its lock is held."""

    @property
    def lines(self) -> Sequence[bytes]:
        """All complete lines when the lock was taken, oldest first, without their ends."""
        ...

    @property
    def head(self) -> bytes | None:
        """What was last kept of this journal outside of the device's storage; None if nothing ever was."""
        ...

    @property
    def head_location(self) -> str:
        """Where a person finds that, for messages."""
        ...

    def append(self, line: bytes) -> None:
        """Add a line, whole or not at all."""
        ...

    def write_head(self, head: bytes) -> None:
        """Replace the head in one step, once the lines are durable."""
        ...


class Storage(Protocol):
    """What one device keeps. Names are relative paths; nobody but the device's own code chooses them."""

    def read(self, name: str) -> bytes | None:
        """A blob; None if there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replace a blob in one step: a crash leaves the old content or the new, never a mixture."""
        ...

    def remove(self, name: str) -> None:
        """Forget a blob, if it is there."""
        ...

    def journal(self, name: str) -> AbstractContextManager[Journal]:
        """A journal under an exclusive lock: whoever else opens it waits, in this process or another."""
        ...

    def where(self, name: str) -> str:
        """Where a person finds it, for messages."""
        ...


class FileStorage:
    """The files of one device in `folder`, each write fsynced by itself.

    Args:
        heads: the folder for the heads of its journals, by default beside `folder`: whoever restores, clones or
            deletes the one should not take the other along.
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
        handle = _locked(path)
        try:
            yield _FileJournal(handle, _whole_lines(path, handle), self.heads / name)
        finally:
            os.close(handle)  # and unlock

    def set_aside(self, journal: str, *beside: str) -> Path | None:
        """Move a journal, what lies beside it and at last its head into a new folder here, under the journal's lock.

        A crash on the way leaves a head without a journal; done again, it goes on. None if nothing is there.
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
        whole = line + b"\n"
        if os.write(self._handle, whole) < len(whole):
            raise OSError("the disk is full: the journal's line was cut short")
        self._sync()

    def write_head(self, head: bytes) -> None:
        if not self._synced:
            self._sync()  # of a line that a process wrote before it was killed nobody knows that it is durable
        atomic_files.write(self._head, head)

    def _sync(self) -> None:
        os.fsync(self._handle)
        self._synced = True


def _locked(path: Path) -> int:
    """A handle on the journal that lies there once it is locked: the one waited for may have been set aside."""
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


def _whole_lines(path: Path, handle: int) -> list[bytes]:
    """Complete lines; a torn last one is cut off: nothing was done yet on the strength of it."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.ftruncate(handle, len(whole))
        os.fsync(handle)
    return whole.splitlines()
