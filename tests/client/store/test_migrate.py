"""Stores of every version become one of this, whenever they are killed on the way; what is newer is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from client.cli.ledger import reset
from client.store import layout, migrate
from client.store.open import inspect_store, open_store
from client.store.store import PersonalAdapter, Store
from common.errors import AntherError
from privacy.ledger.ledger import DeviceLedger
from privacy.storage import FileStorage
from tests.helpers.devices import BASE, SITES, adapter
from tests.helpers.kills import counted, killed_before
from tests.privacy.ledger.test_ledger import FIRST, free, replace

ID = "f" * 64


def of_before(folder: Path) -> FileStorage:
    """A store as it was before there were versions, with what a killed write has left."""
    files = FileStorage(folder / "store", heads=folder / "heads")
    store = Store(files)
    store.ledger.reserve(FIRST, free)
    store.ledger.seal(FIRST, b"reply")
    store.save_personal(PersonalAdapter(adapter(2), adapter(3), BASE, "run:1"))
    store.save_number("base", "k", 0.5)
    store.seed()
    (files.folder / ".personal.safetensors.k2_x9abc").write_bytes(b"half an adapter")
    (files.folder / ".config").write_text("the owner's own")
    return files


def test_what_was_there_before_versions_stays_valid(tmp_path: Path) -> None:
    files = of_before(tmp_path)
    seed, entries = Store(files).seed(), DeviceLedger(files).entries()
    for _ in range(2):
        with open_store(files) as found:
            kept = found.store.personal(SITES)
            assert kept is not None
            assert (kept.request, found.federation) == ("run:1", None)
            assert (found.store.seed(), found.store.number("base", "k")) == (seed, 0.5)
            assert found.store.ledger.entries() == entries
    assert (files.folder / "version").read_text() == "1\n"
    assert not list(files.folder.glob(".personal*"))
    assert (files.folder / ".config").exists()


def test_a_newer_store_is_left_alone_and_its_owner_told_what_to_do(tmp_path: Path) -> None:
    files = of_before(tmp_path)
    files.write("version", b"2\n")
    before = {path: path.read_bytes() for path in files.folder.rglob("*") if path.is_file()}
    for attempt in (open_store(files).__enter__, lambda: inspect_store(files)):
        with pytest.raises(AntherError, match=r"of version 2, and this Anther knows 1: update Anther"):
            attempt()
    (files.folder / "lock").unlink()
    assert {path: path.read_bytes() for path in files.folder.rglob("*") if path.is_file()} == before
    files.write("version", b"\0\0")
    with pytest.raises(AntherError, match="not a version"):
        inspect_store(files)


def two_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps such as later versions will have: something moves, something is written in another way."""

    def moved(files: FileStorage) -> None:
        if (old := files.read("seed")) is not None:
            files.write("seeds/first", old)
            files.remove("seed")

    def rewritten(files: FileStorage) -> None:
        if not (old := files.read("seeds/first") or b"").startswith(b"seed="):
            files.write("seeds/first", b"seed=" + old)

    monkeypatch.setattr(migrate, "STEPS", (*migrate.STEPS, moved, rewritten))


def test_killed_at_every_durable_step_of_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_more(monkeypatch)
    seed = (of_before(tmp_path / "whole").folder / "seed").read_bytes()

    def upgraded(folder: Path) -> FileStorage:
        with open_store(FileStorage(folder / "store", heads=folder / "heads")) as found:
            return found.files

    shutil.copytree(tmp_path / "whole", tmp_path / "traced")
    calls = counted(lambda: void(upgraded(tmp_path / "traced")), tmp_path / "trace")
    assert {"unlink", "replace", "fsync"} <= set(calls)
    versions = set()
    for call in range(len(calls)):
        folder = tmp_path / str(call)
        shutil.copytree(tmp_path / "whole", folder)
        killed_before(call, lambda folder=folder: void(upgraded(folder)))  # type: ignore[misc]
        versions.add(migrate.version(FileStorage(folder / "store")))
        files = upgraded(folder)
        assert migrate.version(files) == 3
        assert files.read("seeds/first") == b"seed=" + seed
        assert files.read("seed") is None
        assert len(DeviceLedger(files).entries()) == 1
    assert versions == {0, 1, 2, 3}


def void(_: object) -> None:
    pass


def test_federations_one_after_the_other(tmp_path: Path) -> None:
    """Each finds its own again; the ledger, the seed and the caches are the device's."""
    files = FileStorage(tmp_path / "store")
    made = {None: "run:0", "a" * 64: "run:1", ID: "run:2"}
    for number, (federation, request) in enumerate(made.items()):
        with open_store(files, federation=federation) as found:
            assert found.federation == federation
            assert found.store.personal(SITES) is None
            found.store.save_personal(PersonalAdapter(adapter(2), adapter(3), BASE, request), aside=True)
            found.store.save_number("base", "k", 0.5)
            assert found.store.number("base", "k") == 0.5
            found.store.seed()
            found.store.ledger.reserve(replace(FIRST, round=10 + number), free)
            assert len(found.store.ledger.entries()) == number + 1
    for federation, request in made.items():
        kept = Store(files, federation).personal(SITES)
        assert kept is not None
        assert kept.request == request
    assert inspect_store(files).federation == ID  # the last one, for the owner's commands
    with open_store(files) as found:  # also when nobody says which
        assert found.federation == ID
    assert layout.federations(files.folder) == [None, "a" * 64, ID]
    assert {path.name for path in files.folder.iterdir()} == {
        "cache",
        "enrolled",
        "federation",
        "federations",
        "ledger.jsonl",
        "lock",
        "personal.safetensors",
        "seed",
        "version",
    }


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "A", "x" * 81, ".x", "a\n", "é"])
def test_an_id_is_a_plain_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="must be of a-z"):
        Store(FileStorage(tmp_path), name)
    with pytest.raises(AntherError, match="must be of a-z"), open_store(FileStorage(tmp_path), federation=name):
        pass
    if name.strip():
        (tmp_path / "federation").write_text(name + "/")
        with pytest.raises(AntherError, match="federation: federation"):
            inspect_store(FileStorage(tmp_path))


def test_a_reset_takes_along_what_rounds_left_in_every_federation(tmp_path: Path) -> None:
    files = FileStorage(tmp_path / "store")
    for federation in ("", "federations/a/", "federations/b/"):
        files.write(f"{federation}residual.safetensors", b"left")
        files.write(f"{federation}personal.safetensors", b"mine")
    DeviceLedger(files).reserve(FIRST, free)
    reset(files, confirmed=True)
    assert not [*files.folder.glob("federations/*/residual*"), *files.folder.glob("residual*")]
    assert len(list(files.folder.rglob("residual.safetensors"))) == 3
    assert len(list(files.folder.glob("federations/*/personal.safetensors"))) == 2
