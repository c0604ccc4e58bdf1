"""What all devices of a simulated fleet keep, in one SQLite file: ten thousand ledgers without ten thousand folders.

    sqlite3 devices/fleet.sqlite "SELECT line FROM journal WHERE device = 'ada' ORDER BY number"

A write is durable when it returns, as with files, except within `Database.together`: there the writes of many devices
become durable at one commit, all of them or none.
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

_PAGE = 65536  # bytes, the most: adapters are hundreds of KB, and every page of one costs the same
_CACHE = 8192  # KiB of pages held in memory, however large the file
_PATIENCE = 60.0  # seconds to wait for another process to commit

_SCHEMA = f"""
PRAGMA page_size = {_PAGE};
PRAGMA auto_vacuum = INCREMENTAL; -- it keeps track of whose pages are whose: a blob is then removed without reading it
PRAGMA secure_delete = OFF; -- where it is on, removing a blob means writing it once more
PRAGMA cache_size = -{_CACHE};
PRAGMA journal_mode = DELETE; -- it keeps the pages that change, of which a new blob has none: a log would hold it twice
PRAGMA synchronous = EXTRA; -- with less, a power cut can bring a deleted journal back, which takes back a commit
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
    """One SQLite file for the devices of a run; it is made at the first write or look.

    Raises:
        AntherError: from any use of it: the file is damaged, the disk is full, another process won't let go of it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.RLock()  # one transaction at a time, whichever thread asks; it nests
        self._depth = 0
        self._together = False
        self._lost: AntherError | None = None

    def device(self, name: str) -> Storage:
        """The part of one device."""
        return _Part(self, name)

    @contextmanager
    def together(self) -> Iterator[Callable[[], None]]:
        """Within this context only the function that it yields makes writes durable; leaving it calls that once more.

        Leaving it by an exception takes back what was not committed: nothing may have been done yet on the strength
        of it. A write that fails takes back all since the last commit, so from then on every commit fails too.
        """
        if self._together:
            raise RuntimeError("the writes of this database wait for a commit already")
        self._together = True
        try:
            yield self._commit
            self._commit()
        finally:
            self._together, self._lost = False, None
            with self._lock:
                self._roll_back()

    def close(self) -> None:
        """Let go of the file; another use opens it again."""
        with self._lock:
            if self._connection:
                self._connection.close()
            self._connection = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection, with the database locked against every other writer."""
        with self._lock:
            self._depth += 1
            try:
                if self._lost:
                    raise self._lost
                connection = self._opened()
                if not connection.in_transaction:
                    connection.execute("BEGIN IMMEDIATE")
                yield connection
                if self._depth == 1 and not self._together:
                    connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._fail(error) from error
            except BaseException:
                if self._depth == 1 and not self._together:
                    self._roll_back()
                raise
            finally:
                self._depth -= 1

    def _commit(self) -> None:
        with self._lock:
            if self._lost:
                raise self._lost
            try:
                if self._connection and self._connection.in_transaction:
                    self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._fail(error) from error

    def _fail(self, error: sqlite3.Error) -> AntherError:
        """Take back what was not committed: SQLite may have done so by itself, and half of it must not stay."""
        self._roll_back()
        found = AntherError(f"{self.file}: can't be used ({error}): mend that, then resume the run")
        if self._together:
            self._lost = found
        return found

    def _roll_back(self) -> None:
        if self._connection and self._connection.in_transaction:
            self._connection.rollback()

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            atomic_files.make_folder(self.file.parent)
            connection = sqlite3.connect(self.file, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            folder = os.open(self.file.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)  # of two who make it at once SQLite turns one away
                connection.executescript(_SCHEMA)
                os.fsync(folder)
            except sqlite3.Error:
                connection.close()
                raise
            finally:
                os.close(folder)
            self._connection = connection
        return self._connection


class _Part:
    """The rows of one device."""

    __slots__ = ("_database", "_device")

    def __init__(self, database: Database, device: str) -> None:
        self._database, self._device = database, device

    def read(self, name: str) -> bytes | None:
        with self._database.transaction() as connection:
            found = connection.execute("SELECT data FROM blobs WHERE (device, name) = (?, ?)", (self._device, name))
            row = found.fetchone()
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
            yield _Rows(connection, self._device, name, f"{self._database.file}: {self._device}'s head of {name}")

    def where(self, name: str) -> str:
        return f"{self._database.file}: {self._device}/{name}"


class _Rows:
    """A journal; one that can't be read fails at once, not at its first line. Its head is in another table."""

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
