"""One device's storage in both implementations, with direct access to the stored data."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from privacy.storage import FileStorage, Storage
from simulations.fleet.storage import FILE, Database

NAME, JOURNAL, MARKER = "device", "ledger.jsonl", "enrolled"


class StoredDevice(Protocol):
    """The stored data of one device, seen from outside."""

    def storage(self) -> Storage:
        """Open the storage anew, as another process would."""
        ...

    def lines(self) -> list[bytes]:
        """The lines of the ledger."""
        ...

    def put_lines(self, lines: Sequence[bytes]) -> None: ...

    def head(self) -> bytes | None: ...

    def put_head(self, data: bytes | None) -> None:
        """Replace the head; None removes it."""
        ...

    def blobs(self) -> dict[str, bytes]:
        """All blobs except the marker."""
        ...

    def put_blob(self, name: str, data: bytes | None) -> None:
        """Replace a blob; None removes it."""
        ...


class FileDevice:
    def __init__(self, folder: Path) -> None:
        self._folder = folder / NAME

    def storage(self) -> Storage:
        return FileStorage(self._folder)

    def lines(self) -> list[bytes]:
        return (self._folder / JOURNAL).read_bytes().splitlines()

    def put_lines(self, lines: Sequence[bytes]) -> None:
        (self._folder / JOURNAL).write_bytes(b"".join(line + b"\n" for line in lines))

    def head(self) -> bytes | None:
        path = self._head()
        return path.read_bytes() if path.exists() else None

    def put_head(self, data: bytes | None) -> None:
        self._head().unlink() if data is None else self._head().write_bytes(data)

    def _head(self) -> Path:
        return self._folder.with_name(f"{NAME}.heads") / JOURNAL

    def blobs(self) -> dict[str, bytes]:
        files = [path for path in self._folder.rglob("*") if path.is_file() and path.name not in (JOURNAL, MARKER)]
        return {path.relative_to(self._folder).as_posix(): path.read_bytes() for path in files}

    def put_blob(self, name: str, data: bytes | None) -> None:
        path = self._folder / name
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)


class DatabaseDevice:
    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE

    def storage(self) -> Storage:
        return Database(self._file).device(NAME)

    def lines(self) -> list[bytes]:
        return [line for (line,) in self._run("SELECT line FROM journal WHERE device = ? ORDER BY number", NAME)]

    def put_lines(self, lines: Sequence[bytes]) -> None:
        self._run("DELETE FROM journal WHERE device = ?", NAME)
        for number, line in enumerate(lines, start=1):
            self._run("INSERT INTO journal VALUES (?, ?, ?, ?)", NAME, JOURNAL, number, line)

    def head(self) -> bytes | None:
        result = self._run("SELECT head FROM heads WHERE device = ?", NAME)
        return result[0][0] if result else None

    def put_head(self, data: bytes | None) -> None:
        self._run("DELETE FROM heads WHERE device = ?", NAME)
        if data is not None:
            self._run("INSERT INTO heads VALUES (?, ?, ?)", NAME, JOURNAL, data)

    def blobs(self) -> dict[str, bytes]:
        return dict(self._run("SELECT name, data FROM blobs WHERE device = ? AND name <> ?", NAME, MARKER))

    def put_blob(self, name: str, data: bytes | None) -> None:
        self._run("DELETE FROM blobs WHERE (device, name) = (?, ?)", NAME, name)
        if data is not None:
            self._run("INSERT INTO blobs VALUES (?, ?, ?)", NAME, name, data)

    def _run(self, statement: str, *values: object) -> list[tuple]:
        with closing(sqlite3.connect(self._file, isolation_level=None)) as connection:
            return connection.execute(statement, values).fetchall()


STORED_DEVICES = (FileDevice, DatabaseDevice)
