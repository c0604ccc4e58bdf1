"""Stores of every version are upgraded, even if killed on the way; newer stores are not touched."""

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
from tests.helpers.kills import durable_calls, killed_before
from tests.privacy.ledger.test_ledger import FIRST, free, replace

ID = "f" * 64


def store_without_version(folder: Path) -> FileStorage:
    """Create a store without a version, with the temporary files of a killed write."""
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


def test_store_without_version_stays_valid(tmp_path: Path) -> None:
    files = store_without_version(tmp_path)
    seed, entries = Store(files).seed(), DeviceLedger(files).entries()
    for _ in range(2):
        with open_store(files) as opened:
            stored = opened.store.personal(SITES)
            assert stored is not None
            assert (stored.request, opened.federation) == ("run:1", None)
            assert (opened.store.seed(), opened.store.number("base", "k")) == (seed, 0.5)
            assert opened.store.ledger.entries() == entries
    assert (files.folder / "version").read_text() == "1\n"
    assert not list(files.folder.glob(".personal*"))
    assert (files.folder / ".config").exists()


def test_newer_store_is_refused(tmp_path: Path) -> None:
    files = store_without_version(tmp_path)
    files.write("version", b"2\n")
    before = {path: path.read_bytes() for path in files.folder.rglob("*") if path.is_file()}
    for attempt in (open_store(files).__enter__, lambda: inspect_store(files)):
        with pytest.raises(AntherError, match=r"has version 2, and this Anther supports up to 1: update Anther"):
            attempt()
    (files.folder / "lock").unlink()
    assert {path: path.read_bytes() for path in files.folder.rglob("*") if path.is_file()} == before
    files.write("version", b"\0\0")
    with pytest.raises(AntherError, match="not a version"):
        inspect_store(files)


def extra_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add two upgrade steps, as later versions may: one moves a file, one rewrites a file."""

    def move_file(files: FileStorage) -> None:
        if (old := files.read("seed")) is not None:
            files.write("seeds/first", old)
            files.remove("seed")

    def rewrite_file(files: FileStorage) -> None:
        if not (old := files.read("seeds/first") or b"").startswith(b"seed="):
            files.write("seeds/first", b"seed=" + old)

    monkeypatch.setattr(migrate, "STEPS", (*migrate.STEPS, move_file, rewrite_file))


@pytest.mark.integration
def test_kill_at_every_step_of_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra_steps(monkeypatch)
    seed = (store_without_version(tmp_path / "whole").folder / "seed").read_bytes()

    def upgraded(folder: Path) -> FileStorage:
        with open_store(FileStorage(folder / "store", heads=folder / "heads")) as result:
            return result.files

    shutil.copytree(tmp_path / "whole", tmp_path / "traced")
    calls = durable_calls(lambda: void(upgraded(tmp_path / "traced")), tmp_path / "trace")
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


def test_successive_federations(tmp_path: Path) -> None:
    """Each federation finds its files again; ledger, seed and caches belong to the device."""
    files = FileStorage(tmp_path / "store")
    created = {None: "run:0", "a" * 64: "run:1", ID: "run:2"}
    for number, (federation, request) in enumerate(created.items()):
        with open_store(files, federation=federation) as opened:
            assert opened.federation == federation
            assert opened.store.personal(SITES) is None
            opened.store.save_personal(PersonalAdapter(adapter(2), adapter(3), BASE, request), aside=True)
            opened.store.save_number("base", "k", 0.5)
            assert opened.store.number("base", "k") == 0.5
            opened.store.seed()
            opened.store.ledger.reserve(replace(FIRST, round=10 + number), free)
            assert len(opened.store.ledger.entries()) == number + 1
    for federation, request in created.items():
        stored = Store(files, federation).personal(SITES)
        assert stored is not None
        assert stored.request == request
    assert inspect_store(files).federation == ID  # the last federation, for the owner's commands
    with open_store(files) as opened:  # also without a given federation
        assert opened.federation == ID
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
def test_federation_id_is_a_plain_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="must consist of a-z"):
        Store(FileStorage(tmp_path), name)
    with pytest.raises(AntherError, match="must consist of a-z"), open_store(FileStorage(tmp_path), federation=name):
        pass
    if name.strip():
        (tmp_path / "federation").write_text(name + "/")
        with pytest.raises(AntherError, match="federation: federation"):
            inspect_store(FileStorage(tmp_path))


def test_reset_sets_round_state_aside(tmp_path: Path) -> None:
    files = FileStorage(tmp_path / "store")
    for federation in ("", "federations/a/", "federations/b/"):
        files.write(f"{federation}residual.safetensors", b"left")
        files.write(f"{federation}personal.safetensors", b"mine")
    DeviceLedger(files).reserve(FIRST, free)
    reset(files, confirmed=True)
    assert not [*files.folder.glob("federations/*/residual*"), *files.folder.glob("residual*")]
    assert len(list(files.folder.rglob("residual.safetensors"))) == 3
    assert len(list(files.folder.glob("federations/*/personal.safetensors"))) == 2
