"""The SuperLink's database on disk. Its size is bounded, because devices can fill it.

Nothing in it must survive a restart: enrolled devices are in `register.json`, results of rounds are in the
run's checkpoints, and its messages belong to a ServerApp that has ended with its SuperLink.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

_CONTENTS = (  # tables of messages and their objects; Flower's other tables are kept
    "object_push_session_pending",
    "object_push_session_roots",
    "object_push_sessions",
    "object_children",
    "run_objects",
    "objects",
    "message_res",
    "message_ins",
    "task_message",
    "message",
)


def prepare(file: Path) -> None:
    """Delete all messages from a stopped SuperLink's database, and make it release free space automatically.

    A database that can't be read is removed; the next start creates another.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for table in _CONTENTS:
                if table in tables:
                    database.execute(f"DELETE FROM {table}")
            database.commit()
            database.execute("PRAGMA auto_vacuum = FULL")  # takes effect with the VACUUM
            database.execute("VACUUM")
    except sqlite3.DatabaseError:
        for part in _files(file):
            part.unlink(missing_ok=True)


def size(file: Path) -> int:
    """Return the bytes of the database on disk, its write-ahead log included."""
    total = 0
    for part in _files(file):
        with contextlib.suppress(OSError):
            total += part.stat().st_size
    return total


def _files(file: Path) -> list[Path]:
    """List a database's files."""
    return [file, *(file.with_name(f"{file.name}{end}") for end in ("-wal", "-shm", "-journal"))]
