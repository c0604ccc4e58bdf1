"""The SuperLink's database after a restart."""

import os
import sqlite3
from contextlib import closing

from server.supervisor import database


def fill(file):
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE objects (object_id TEXT, content BLOB)")
        connection.execute("CREATE TABLE node (node_id INTEGER)")
        connection.execute("INSERT INTO node VALUES (7)")
        connection.executemany("INSERT INTO objects VALUES (?, ?)", [(str(n), os.urandom(1 << 16)) for n in range(32)])
        connection.commit()


def test_restart_deletes_messages_and_keeps_nodes(tmp_path):
    file = tmp_path / "superlink.db"
    database.prepare(file)
    fill(file)
    before = database.size(file)
    assert before > 32 << 16
    database.prepare(file)
    assert database.size(file) < before / 20
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT node_id FROM node").fetchall() == [(7,)]
        assert connection.execute("SELECT count(*) FROM objects").fetchone() == (0,)


def test_deletion_releases_space(tmp_path):
    file = tmp_path / "superlink.db"
    database.prepare(file)
    fill(file)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("DELETE FROM objects")
        connection.commit()
    assert database.size(file) < 1 << 18


def test_damaged_database_is_removed(tmp_path):
    file = tmp_path / "superlink.db"
    file.write_bytes(b"no database" * 1000)
    database.prepare(file)
    assert not file.exists()
