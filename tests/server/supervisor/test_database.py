"""What is left of a SuperLink's database when it starts again."""

import os
import sqlite3
from contextlib import closing

from server.supervisor import database


def filled(file):
    with closing(sqlite3.connect(file)) as found:
        found.execute("CREATE TABLE objects (object_id TEXT, content BLOB)")
        found.execute("CREATE TABLE node (node_id INTEGER)")
        found.execute("INSERT INTO node VALUES (7)")
        found.executemany("INSERT INTO objects VALUES (?, ?)", [(str(n), os.urandom(1 << 16)) for n in range(32)])
        found.commit()


def test_messages_go_and_nodes_stay(tmp_path):
    file = tmp_path / "superlink.db"
    database.prepare(file)
    filled(file)
    before = database.size(file)
    assert before > 32 << 16
    database.prepare(file)
    assert database.size(file) < before / 20
    with closing(sqlite3.connect(file)) as found:
        assert found.execute("SELECT node_id FROM node").fetchall() == [(7,)]
        assert found.execute("SELECT count(*) FROM objects").fetchone() == (0,)


def test_space_is_given_back_without_a_restart(tmp_path):
    file = tmp_path / "superlink.db"
    database.prepare(file)
    filled(file)
    with closing(sqlite3.connect(file)) as found:
        found.execute("DELETE FROM objects")
        found.commit()
    assert database.size(file) < 1 << 18


def test_a_damaged_one_is_replaced(tmp_path):
    file = tmp_path / "superlink.db"
    file.write_bytes(b"no database" * 1000)
    database.prepare(file)
    assert not file.exists()
