"""Storage of all devices of a simulated fleet in one SQLite file, instead of a folder and ledger for each device.

    sqlite3 devices/fleet.sqlite "SELECT line FROM journal WHERE device = 'ada' ORDER BY number"

A write is durable when it returns, as with files, except within `Database.group_commit`: there the writes of many
devices become durable in one commit, all of them or none.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common import atomic_files
from common.errors import AntherError
from privacy.storage import Journal, Storage

FILE = "fleet.sqlite"

_PAGE = 65536  # bytes, the maximum: adapters are hundreds of KB, and each of their pages has the same overhead
_CACHE = 8192  # KiB of pages in memory, for a file of any size
_LOCK_TIMEOUT = 60.0  # seconds to wait for another process to commit

_SCHEMA = f"""
PRAGMA page_size = {_PAGE};
PRAGMA auto_vacuum = INCREMENTAL; -- tracks the owner of each page, so that a blob is removed without reading it
PRAGMA secure_delete = OFF; -- if on, a removed blob is overwritten
PRAGMA cache_size = -{_CACHE};
PRAGMA journal_mode = DELETE; -- journals changed pages only, and a new blob changes none; a WAL would hold it twice
PRAGMA synchronous = EXTRA; -- with less, a power cut can restore a deleted journal, which undoes a commit
CREATE TABLE IF NOT EXISTS blobs (device TEXT, name TEXT, data BLOB NOT NULL, PRIMARY KEY (device, name));
CREATE TABLE IF NOT EXISTS journal (
    device TEXT, name TEXT, number INTEGER, line BLOB NOT NULL, PRIMARY KEY (device, name, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS heads (device TEXT, name TEXT, head BLOB NOT NULL, PRIMARY KEY (device, name)) WITHOUT ROWID;
"""

_JOURNAL = """
SELECT 0, head FROM heads WHERE (device, name) = (?, ?)
UNION ALL SELECT number, line FROM journal WHERE (device, name) = (?, ?) ORDER BY 1
"""


class Database:
    """SQLite file with the storage of a run's devices; created at the first read or write.

    Raises:
        AntherError: on any use, if the file is damaged, the disk is full, or another process has locked it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.RLock()  # one transaction at a time across threads; reentrant
        self._depth = 0
        self._grouping = False
        self._failure: AntherError | None = None

    def device(self, name: str) -> Storage:
        """Return the storage of one device."""
        return _DeviceStorage(self, name)

    @contextmanager
    def group_commit(self) -> Iterator[Callable[[], None]]:
        """Yield a function that makes writes durable; within this context, writes aren't durable before it is called.

        It is also called when the context ends. An exception in the context undoes uncommitted writes, so nothing may
        rely on them before the commit. A failed write undoes all writes since the last commit, and every later commit
        fails too.
        """
        if self._grouping:
            raise RuntimeError("this database is in a group commit already")
        self._grouping = True
        try:
            yield self._commit
            self._commit()
        finally:
            self._grouping, self._failure = False, None
            with self._lock:
                self._roll_back()

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._connection:
                self._connection.close()
            self._connection = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection, with the database locked against other writers."""
        with self._lock:
            self._depth += 1
            try:
                if self._failure:
                    raise self._failure
                connection = self._open()
                if not connection.in_transaction:
                    connection.execute("BEGIN IMMEDIATE")
                yield connection
                if self._depth == 1 and not self._grouping:
                    connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._fail(error) from error
            except BaseException:
                if self._depth == 1 and not self._grouping:
                    self._roll_back()
                raise
            finally:
                self._depth -= 1

    def _commit(self) -> None:
        with self._lock:
            if self._failure:
                raise self._failure
            try:
                if self._connection and self._connection.in_transaction:
                    self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._fail(error) from error

    def _fail(self, error: sqlite3.Error) -> AntherError:
        """Undo uncommitted writes: SQLite may have done so by itself, and none may be kept without the others."""
        self._roll_back()
        failure = AntherError(f"{self.file}: can't be used ({error}): fix the cause, then resume the run")
        if self._grouping:
            self._failure = failure
        return failure

    def _roll_back(self) -> None:
        if self._connection and self._connection.in_transaction:
            self._connection.rollback()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            atomic_files.make_folder(self.file.parent)
            connection = sqlite3.connect(
                self.file, timeout=_LOCK_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            folder = os.open(self.file.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)  # SQLite rejects one of two processes that create it at once
                connection.executescript(_SCHEMA)
                os.fsync(folder)
            except sqlite3.Error:
                connection.close()
                raise
            finally:
                os.close(folder)
            self._connection = connection
        return self._connection


class _DeviceStorage:
    """Storage of one device, in its rows of the tables."""

    __slots__ = ("_database", "_device")

    def __init__(self, database: Database, device: str) -> None:
        self._database, self._device = database, device

    def read(self, name: str) -> bytes | None:
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT data FROM blobs WHERE (device, name) = (?, ?)", (self._device, name)
            ).fetchone()
        return row[0] if row else None

    def write(self, name: str, data: bytes) -> None:
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?, ?)", (self._device, name, data))

    def remove(self, name: str) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM blobs WHERE (device, name) = (?, ?)", (self._device, name))

    @contextmanager
    def journal(self, name: str) -> Iterator[Journal]:
        with self._database.transaction() as connection:
            yield _TableJournal(
                connection, self._device, name, f"{self._database.file}: {self._device}'s head of {name}"
            )

    def where(self, name: str) -> str:
        return f"{self._database.file}: {self._device}/{name}"


class _TableJournal:
    """Journal in a table; its head is in another table.

    An unreadable journal fails when it is opened, not at its first line.
    """

    def __init__(self, connection: sqlite3.Connection, device: str, name: str, head_location: str) -> None:
        self._connection, self._key, self.head_location = connection, (device, name), head_location
        rows = connection.execute(_JOURNAL, self._key * 2).fetchall()
        self.head: bytes | None = rows.pop(0)[1] if rows and rows[0][0] == 0 else None
        self.lines: Sequence[bytes] = [line for _, line in rows]
        self._last = rows[-1][0] if rows else 0

    def write_head(self, head: bytes) -> None:
        self._connection.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", (*self._key, head))

    def append(self, line: bytes) -> None:
        self._last += 1
        self._connection.execute("INSERT INTO journal VALUES (?, ?, ?, ?)", (*self._key, self._last, line))
