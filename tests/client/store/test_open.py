"""A store with a key is encrypted completely, and a missing key never starts a new store."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from client.cli import ledger
from client.store import layout
from client.store.open import inspect_store, open_store
from client.store.round_state import ControlVariateState, LocalFactors, MethodState, Residual
from client.store.store import PersonalAdapter, Store
from common.errors import AntherError
from privacy.encrypted_storage import EncryptedStorage, is_encrypted
from privacy.ledger.ledger import JOURNAL, DeviceLedger
from privacy.storage import FileStorage
from tests.helpers.devices import BASE, SITES, adapter
from tests.helpers.kills import durable_calls, killed_before
from tests.privacy.ledger.test_ledger import FIRST, KEY, PLAN, free, replace
from training.jobs import Examples

SECRET = b"a personal secret of the owner"  # searched for in all bytes on disk
FEDERATION = "f" * 64


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    file = tmp_path / "key"
    file.write_bytes(os.urandom(32))
    file.chmod(0o600)
    monkeypatch.setenv("ANTHER_KEY_FILE", str(file))
    return file


def files_in(folder: Path) -> FileStorage:
    return FileStorage(folder / "store", heads=folder / "heads")


def fill(store: Store) -> None:
    """Store one value of every kind that a device stores, each containing a secret."""
    one, other = ({SECRET.decode(): torch.full((3,), float(number))} for number in range(2))
    store.ledger.reserve(replace(FIRST, run=SECRET.decode()), free)
    store.ledger.seal(replace(FIRST, run=SECRET.decode()), SECRET)
    store.save_personal(PersonalAdapter(adapter(2), adapter(3), BASE, SECRET.decode()))
    store.save_personal(PersonalAdapter(adapter(2), adapter(3), BASE, SECRET.decode()), aside=True)
    store.save_residual(Residual("f", 1, one, other))
    store.save_variate(ControlVariateState("f", 1, one, other))
    store.save_local_factors(LocalFactors("r", "p", 1, one, other))
    store.save_method_state(MethodState("f", 1, one, other))
    store.save_examples("train", SECRET.decode(), Examples(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 2)))
    store.save_number("base", SECRET.decode(), 0.5)
    store.save_preview("1", np.zeros((1, 4, 4), np.uint8))
    store.seed()


def check_complete(store: Store) -> None:
    """Check that all stored values can be read."""
    assert len(store.ledger.entries()) == 1
    assert store.ledger.sealed((SECRET.decode(), *KEY[1:]), PLAN) == SECRET
    assert store.personal(SITES) is not None
    assert store.residual("f") is not None
    assert store.variate("f") is not None
    assert store.local_factors("r") is not None
    assert store.method_state("f") is not None
    assert store.examples("train", SECRET.decode()) is not None
    assert store.number("base", SECRET.decode()) == 0.5
    store.roll_back()


def leaks(folder: Path) -> list[str]:
    """List the files that contain the secret, except those that are stored unencrypted by design."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".png" and (SECRET in (data := path.read_bytes()) or b'{"__meta' in data)
    ]


@pytest.mark.parametrize("federation", [None, FEDERATION])
@pytest.mark.parametrize("when", ["from the start", "later"])
def test_store_with_key_is_encrypted(when: str, federation: str | None, key: Path, tmp_path: Path) -> None:
    files = files_in(tmp_path)
    if when == "later":
        with open_store(files, encrypt="never", federation=federation) as opened:
            fill(opened.store)
        assert len(leaks(tmp_path)) >= 9
        (seed,) = [(files.folder / "seed").read_bytes()]
    with open_store(files, encrypt="auto", federation=federation) as opened:
        assert isinstance(opened.storage, EncryptedStorage)
        if when == "later":
            assert opened.store.seed() == int(seed)
        else:
            fill(opened.store)
    assert leaks(tmp_path) == []
    for path in (*files.folder.rglob("*"), *files.heads.rglob("*")):
        name = path.relative_to(files.folder).as_posix() if path.is_relative_to(files.folder) else "head"
        if path.is_file() and name not in ("sealed", "lock") and not layout.is_plaintext(name):
            assert is_encrypted(path.read_bytes()), name
    check_complete(inspect_store(files).store)
    key.rename(key.with_name("moved"))
    with pytest.raises(AntherError, match="can't be read"):
        inspect_store(files)


@pytest.mark.integration
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.stress)])
def test_kill_at_every_step_of_encryption(every: int, key: Path, tmp_path: Path) -> None:
    assert key.exists()
    whole = files_in(tmp_path / "whole")
    with open_store(whole, encrypt="never") as opened:
        fill(opened.store)
    ledger.reset(whole, confirmed=True)  # files set aside are encrypted too
    with open_store(whole, encrypt="never") as opened:
        fill(opened.store)

    def encrypted(folder: Path) -> None:
        with open_store(files_in(folder), encrypt="auto"):
            pass

    shutil.copytree(tmp_path / "whole", tmp_path / "traced")
    calls = durable_calls(lambda: encrypted(tmp_path / "traced"), tmp_path / "trace")
    assert len(calls) > 40
    assert leaks(tmp_path / "traced") == []
    for call in range(0, len(calls), every):
        folder = tmp_path / str(call)
        shutil.copytree(tmp_path / "whole", folder)
        killed_before(call, lambda folder=folder: encrypted(folder))  # type: ignore[misc]
        if (folder / "store" / "sealed").exists():
            inspect_store(files_in(folder))  # an owner's command continues the encryption
        encrypted(folder)
        assert leaks(folder) == []
        check_complete(inspect_store(files_in(folder)).store)
        shutil.rmtree(folder)


def test_store_without_its_key_is_refused(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_in(tmp_path)
    with open_store(files, encrypt="always") as result:
        fill(result.store)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    monkeypatch.delenv("ANTHER_KEY_FILE")
    for encrypt in ("auto", "always", "never"):
        with pytest.raises(AntherError, match="the store is encrypted, but no key is set") as raised:
            open_store(files, encrypt=encrypt).__enter__()
        assert "\n" not in str(raised.value)
    with pytest.raises(AntherError, match="no key"):
        inspect_store(files)
    monkeypatch.setenv("ANTHER_KEY_FILE", str(key))
    opened = key.read_bytes()
    key.write_bytes(os.urandom(32))
    with pytest.raises(AntherError, match="encrypted with another key"):
        open_store(files, encrypt="auto").__enter__()
    seal = (files.folder / "sealed").read_bytes()
    (files.folder / "sealed").unlink()
    for encrypt in ("auto", "always", "never"):
        with pytest.raises(AntherError, match="sealed: missing, but the store is encrypted"):
            open_store(files, encrypt=encrypt).__enter__()
    (files.folder / "sealed").write_bytes(seal)
    key.write_bytes(opened)
    assert {path: path.read_bytes() for path in before} == before
    with open_store(files, encrypt="auto") as result:
        check_complete(result.store)


def test_lost_store_is_not_replaced(key: Path, tmp_path: Path) -> None:
    assert key.exists()
    files = files_in(tmp_path)
    with open_store(files, encrypt="auto") as opened:
        fill(opened.store)
    shutil.rmtree(files.folder)
    with pytest.raises(AntherError, match="sealed: missing"):
        open_store(files, encrypt="auto").__enter__()


def test_contradicting_settings_are_refused(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_in(tmp_path)
    monkeypatch.delenv("ANTHER_KEY_FILE")
    with pytest.raises(AntherError, match=r"storage\.encrypt=always: no key is set"):
        open_store(files, encrypt="always").__enter__()
    with open_store(files, encrypt="auto") as opened:
        assert opened.storage is files  # no key: the store is unencrypted
    monkeypatch.setenv("ANTHER_KEY_FILE", str(key))
    with open_store(files) as opened:  # an owner's command doesn't start encryption
        assert opened.storage is files
    with open_store(files, encrypt="auto"):
        pass
    with pytest.raises(AntherError, match=r"storage\.encrypt=never: .* is already encrypted"):
        open_store(files, encrypt="never").__enter__()


def test_damaged_files_are_rebuilt_or_named(key: Path, tmp_path: Path) -> None:
    assert key.exists()
    files = files_in(tmp_path)
    with open_store(files, encrypt="auto") as opened:
        fill(opened.store)
    for path in files.folder.rglob("*"):
        if (path.is_file() and path.parent.name == "cache") or path.suffix == ".safetensors":
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with open_store(files, encrypt="auto") as opened:
        store = opened.store
        assert store.examples("train", SECRET.decode()) is None
        assert store.number("base", SECRET.decode()) is None
        assert store.residual("f") is None
        assert store.variate("f") is None
        assert store.local_factors("r") is None
        assert store.method_state("f") is None
        assert store.personal_sites() == ()
        with pytest.raises(AntherError, match=r"personal\.safetensors: not a personal adapter.*personalize again"):
            store.personal(SITES)


def test_reset_after_losing_the_key(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_in(tmp_path)
    with open_store(files, encrypt="auto", federation=FEDERATION) as opened:
        fill(opened.store)
    monkeypatch.delenv("ANTHER_KEY_FILE")
    response = ledger.reset(files, confirmed=True)
    assert str(files.folder / "forgotten-1") in response
    assert (files.folder / "forgotten-1" / JOURNAL).exists()
    with open_store(files, encrypt="auto") as opened:
        assert opened.store.ledger.entries() == ()
        fill(opened.store)
    assert key.exists()
    assert len(DeviceLedger(files).entries()) == 1
