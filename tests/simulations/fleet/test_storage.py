"""Storage of a fleet in one file: committed writes are durable, others leave no trace."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from client.store.store import PersonalAdapter, Store
from common.errors import AntherError
from privacy.storage import FileStorage
from protocol.records import request_to_records
from simulations.fleet.storage import FILE, Database
from simulations.grid.cohort import CohortGrid
from tests.helpers.devices import BASE, SITES, Performer, adapter, make_device, to_bytes, train_request
from training.jobs import Examples


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "devices" / FILE)


def read_from_other_process(database: Database, name: str = "x", device: str = "ada") -> bytes | None:
    """Read in another process."""
    return Database(database.file).device(device).read(name)


def test_file_is_created_on_demand(database: Database) -> None:
    for name in map(str, range(1000)):
        database.device(name)
    assert not database.file.parent.exists()


def test_devices_are_separate(database: Database) -> None:
    ada, bob = database.device("ada"), database.device("bob")
    ada.write("x", b"1")
    bob.write("x", b"2")
    ada.write("x", b"3")
    assert (ada.read("x"), bob.read("x"), bob.read("y")) == (b"3", b"2", None)
    for device, line in ((ada, b"a"), (bob, b"b"), (ada, b"aa")):
        with device.journal("ledger.jsonl") as journal:
            journal.append(line)
    with ada.journal("ledger.jsonl") as journal:
        assert journal.lines == [b"a", b"aa"]
    bob.remove("x")
    bob.remove("x")
    assert (ada.read("x"), bob.read("x")) == (b"3", None)
    assert database.file.parent.stat().st_mode & 0o077 == 0


def test_single_write_is_durable(database: Database) -> None:
    database.device("ada").write("x", b"1")
    assert read_from_other_process(database) == b"1"


def test_group_commit_delays_writes(database: Database) -> None:
    ada, bob = database.device("ada"), database.device("bob")
    ada.write("x", b"0")
    with database.group_commit() as commit:
        ada.write("x", b"1")
        assert ada.read("x") == b"1"
        reader = sqlite3.connect(database.file)
        query = "SELECT data FROM blobs WHERE name = 'x' ORDER BY device"
        assert reader.execute(query).fetchall() == [(b"0",)]
        commit()
        assert reader.execute(query).fetchall() == [(b"1",)]
        bob.write("x", b"2")
    assert reader.execute(query).fetchall() == [(b"1",), (b"2",)]
    reader.close()
    ada.write("x", b"3")  # a single write again
    assert read_from_other_process(database) == b"3"


def test_exception_undoes_uncommitted_writes(database: Database) -> None:
    ada = database.device("ada")

    def fail() -> None:
        with database.group_commit() as commit:
            ada.write("x", b"1")
            commit()
            ada.write("x", b"2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert ada.read("x") == b"1"


def test_exception_in_a_journal_harms_no_other_device(database: Database) -> None:
    ada, bob = database.device("ada"), database.device("bob")
    with database.group_commit():
        ada.write("x", b"1")
        with pytest.raises(ValueError, match="no"), bob.journal("ledger.jsonl"):
            raise ValueError("no")
    assert read_from_other_process(database) == b"1"


def test_group_commits_do_not_nest(database: Database) -> None:
    with (
        database.group_commit(),
        pytest.raises(RuntimeError, match="in a group commit already"),
        database.group_commit(),
    ):
        pass


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files; Python ignores the signal, so a write beyond it fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_failed_write_prevents_commits(database: Database) -> None:
    """One device's reservation may have been undone with another's write, so no job may follow."""
    ada, bob = database.device("ada"), database.device("bob")
    ada.write("x", b"0")

    def serve() -> None:
        with database.group_commit() as commit:
            ada.write("x", b"1")
            # As `run_handlers` does: an error ends one conversation only.
            with largest_file(1 << 20), pytest.raises(AntherError, match=r"fleet\.sqlite: can't be used"):
                bob.write("y", os.urandom(64 << 20))
            with pytest.raises(AntherError, match="can't be used"):
                ada.read("x")
            with pytest.raises(AntherError, match="can't be used"):
                commit()

    with pytest.raises(AntherError, match="can't be used"):
        serve()
    assert (ada.read("x"), bob.read("y")) == (b"0", None)


def test_failed_commit_commits_nothing(database: Database) -> None:
    ada = database.device("ada")
    ada.write("x", b"0")

    def serve() -> None:
        with database.group_commit() as commit:
            ada.write("x", bytes(100_000))
            with largest_file(database.file.stat().st_size):
                commit()

    with pytest.raises(AntherError, match="can't be used") as raised:
        serve()
    assert "\n" not in str(raised.value)
    assert read_from_other_process(database) == b"0"


def test_lock_of_another_process_is_reported(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.fleet.storage._LOCK_TIMEOUT", 0.05)
    database.device("ada").write("x", b"0")
    other = sqlite3.connect(database.file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(AntherError, match="locked"):
        Database(database.file).device("ada").write("x", b"1")
    other.close()
    assert read_from_other_process(database) == b"0"


@pytest.mark.integration
def test_concurrent_creation_is_safe(tmp_path: Path) -> None:
    """The processes of `grid=ray` create it concurrently."""
    for attempt in range(5):
        file, children = tmp_path / str(attempt) / FILE, []
        for number in range(6):
            if (child := os.fork()) == 0:
                status = 1
                with contextlib.suppress(BaseException):
                    with Database(file).device("ada").journal("ledger.jsonl") as journal:
                        journal.append(str(number).encode())
                    status = 0
                os._exit(status)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
        with Database(file).device("ada").journal("ledger.jsonl") as journal:
            assert sorted(journal.lines) == [str(number).encode() for number in range(6)]


def test_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database" * 1000)
    with pytest.raises(AntherError, match=r"fleet\.sqlite: can't be used .*not a database") as raised:
        Database(tmp_path / FILE).device("ada").read("x")
    assert "\n" not in str(raised.value)


def test_storage_is_not_picklable(database: Database) -> None:
    """Another process would not know when to commit."""
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(database.device("ada"))


def test_closed_database_reopens(database: Database) -> None:
    database.device("ada").write("x", b"1")
    database.close()
    assert [path.name for path in database.file.parent.iterdir()] == [FILE]
    assert database.device("ada").read("x") == b"1"


def test_replaced_blobs_are_freed(database: Database) -> None:
    device = database.device("ada")
    for _ in range(30):
        device.write("outbox/a", os.urandom(400_000))
        device.remove("outbox/b")
        device.write("outbox/b", os.urandom(400_000))
    database.close()
    assert database.file.stat().st_size < 5 * 400_000


@pytest.mark.integration
def test_size_is_bounded_over_rounds(database: Database) -> None:
    """A round's sealed reply is replaced by the next; only a few lines of the ledger are added."""
    names, sizes = [f"device {number}" for number in range(20)], []
    devices = [make_device(database.device(name), name=name) for name in names]
    grid = CohortGrid(devices, Performer(), group_commit=database.group_commit)
    for number in range(1, 13):
        content = request_to_records(train_request(number=number, private=True, sent=to_bytes(adapter(1000)), rank=900))
        replies = list(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))
        assert all(reply.has_content() for reply in replies)
        database.close()
        sizes.append(database.file.stat().st_size)
    assert sizes[-1] > 20 * 60_000
    assert sizes[-1] < 1.5 * sizes[2]


def test_store_works_on_both_storages(database: Database, tmp_path: Path) -> None:
    personal = PersonalAdapter(adapter(2), adapter(5, seed=1), BASE, "run:3")
    examples = Examples(torch.randn(3, 4, 2, 2), torch.randn(3, 7, 2))
    for storage in (database.device("ada"), FileStorage(tmp_path / "ada")):
        store = Store(storage)
        assert store.personal(SITES) is store.examples("train", "k") is store.number("base", "k") is None
        store.save_personal(personal)
        store.save_examples("train", "k", examples)
        store.save_number("base", "k", 0.5)
        stored, cached = Store(storage).personal(SITES), store.examples("train", "k")
        assert stored is not None
        assert cached is not None
        assert torch.equal(stored.shared["up.to_k"].b, personal.shared["up.to_k"].b)
        assert torch.equal(cached.latents, examples.latents)
        assert (store.number("base", "k"), store.number("base", "other")) == (0.5, None)
        assert store.seed() == Store(storage).seed()
    device = database.device("ada")
    for name in ("personal.safetensors", "cache/train.safetensors"):
        data = device.read(name)
        assert data is not None
        device.write(name, data[:-1])
    assert Store(device).examples("train", "k") is None
    with pytest.raises(AntherError, match=r"ada/personal\.safetensors: not a personal adapter"):
        Store(device).personal(SITES)
