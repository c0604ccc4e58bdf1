"""Encryption at rest: without the key, data can't be read, changed, swapped or truncated undetected."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AntherError
from privacy.encrypted_storage import (
    ENCRYPTED,
    ENCRYPTING,
    LINE,
    DamagedDataError,
    EncryptedStorage,
    EncryptionHeader,
    StoreCipher,
    is_encrypted,
)
from privacy.ledger.ledger import JOURNAL, DeviceLedger
from privacy.storage import FileStorage
from tests.privacy.ledger.test_ledger import FIRST, KEY, PLAN, free, replace

SECRET = bytes(range(32))


def storage(folder: Path, *, key: bytes = SECRET, store: str = "s") -> EncryptedStorage:
    return EncryptedStorage(FileStorage(folder / "store"), StoreCipher(key, store), lambda name: name == "enrolled")


def test_ledger_works_in_encrypted_storage(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        ledger = DeviceLedger(storage(tmp_path))
        ledger.reserve(replace(FIRST, round=number), free, settles=True)
        ledger.seal(replace(FIRST, round=number), b"reply %d" % number)
    ledger = DeviceLedger(storage(tmp_path))
    assert [entry.state for entry in ledger.entries()] == ["sent", "sent", "sealed"]
    assert ledger.sealed((FIRST.run, 3, FIRST.purpose), PLAN) == b"reply 3"
    lines = (tmp_path / "store" / JOURNAL).read_bytes()
    head = (tmp_path / "store.heads" / JOURNAL).read_bytes()
    (reply,) = (tmp_path / "store" / "outbox").iterdir()
    for data in (lines, head, reply.read_bytes()):
        assert is_encrypted(data)
        for plain in (b"reserved", b"reply", b"round", FIRST.run.encode(), b'"ledger"'):
            assert plain not in data


@given(st.binary(max_size=300), st.text(max_size=20), st.integers(0, 10**6))
def test_decryption_requires_same_key_and_context(data: bytes, name: str, number: int) -> None:
    cipher = StoreCipher(SECRET, "s")
    sealed = cipher.encrypt(data, "blob", name)
    assert cipher.decrypt(sealed, "", "blob", name) == data
    assert sealed != cipher.encrypt(data, "blob", name)  # nonces are random
    line = cipher.encrypt_line(data, name, number)
    assert b"\n" not in line
    assert cipher.decrypt_line(line, "", name, number) == data
    for other in (
        lambda: cipher.decrypt(sealed, "", "blob", name + "x"),
        lambda: cipher.decrypt(sealed, "", "head", name),
        lambda: cipher.decrypt(sealed, "", "blob", name, ""),
        lambda: cipher.decrypt(sealed[:-1], "", "blob", name),
        lambda: cipher.decrypt(sealed[:16], "", "blob", name),
        lambda: cipher.decrypt(data, "", "blob", name),
        lambda: StoreCipher(SECRET, "t").decrypt(sealed, "", "blob", name),
        lambda: StoreCipher(bytes(32), "s").decrypt(sealed, "", "blob", name),
        lambda: cipher.decrypt_line(line, "", name, number + 1),
        lambda: cipher.decrypt_line(data, "", name, number),
        lambda: cipher.decrypt_line(line[:-3], "", name, number),
        lambda: cipher.decrypt(sealed, "", LINE, name, number),
    ):
        with pytest.raises(DamagedDataError):
            other()


def test_changed_byte_is_detected() -> None:
    cipher = StoreCipher(SECRET, "s")
    sealed = cipher.encrypt(b"an adapter", "blob", "x")
    for index in range(len(sealed)):
        changed = bytearray(sealed)
        changed[index] ^= 1
        with pytest.raises(DamagedDataError):
            cipher.decrypt(bytes(changed), "", "blob", "x")


def test_swapped_blobs_are_detected(tmp_path: Path) -> None:
    kept, folder = storage(tmp_path), tmp_path / "store"
    for name in ("personal.safetensors", "previous.safetensors", "federations/a/personal.safetensors"):
        kept.write(name, name.encode())
    shutil.copy(folder / "previous.safetensors", folder / "personal.safetensors")
    shutil.copy(folder / "previous.safetensors", folder / "federations/a/personal.safetensors")
    for name in ("personal.safetensors", "federations/a/personal.safetensors"):
        with pytest.raises(DamagedDataError, match=r"personal\.safetensors: not encrypted under this key and name"):
            kept.read(name)
    assert kept.read("previous.safetensors") == b"previous.safetensors"
    storage(tmp_path, store="another").write("previous.safetensors", b"of another store under the same key")
    with pytest.raises(DamagedDataError):
        kept.read("previous.safetensors")
    (folder / "previous.safetensors").write_bytes(b"in the open")
    with pytest.raises(DamagedDataError):
        kept.read("previous.safetensors")


def journal_with_rounds(folder: Path, rounds: int) -> list[bytes]:
    ledger = DeviceLedger(storage(folder))
    for number in range(1, rounds + 1):
        ledger.reserve(replace(FIRST, round=number), free)
    return (folder / "store" / JOURNAL).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("change", ["swap", "copy", "cut", "open", "none"])
def test_moved_lines_are_detected(change: str, tmp_path: Path) -> None:
    lines = journal_with_rounds(tmp_path, 3)
    changed = {
        "swap": [lines[0], lines[2], lines[1], lines[3]],
        "copy": [lines[0], lines[1], lines[1], lines[3]],
        "cut": lines[:3],
        "open": [*lines[:3], b'{"state": "reserved"}\n'],
        "none": [],
    }[change]
    (tmp_path / "store" / JOURNAL).write_bytes(b"".join(changed))
    with pytest.raises(AntherError, match=r"not encrypted|rolled back|is missing"):
        DeviceLedger(storage(tmp_path)).entries()


def test_head_of_another_ledger_is_rejected(tmp_path: Path) -> None:
    journal_with_rounds(tmp_path / "a", 1)
    journal_with_rounds(tmp_path / "b", 3)
    shutil.copy(tmp_path / "b/store.heads" / JOURNAL, tmp_path / "a/store.heads" / JOURNAL)
    with pytest.raises(AntherError, match="brought from elsewhere"):
        DeviceLedger(storage(tmp_path / "a")).entries()
    head = tmp_path / "b/store.heads" / JOURNAL
    head.write_bytes(b'{"ledger": "x", "events": 1, "sha256": "y"}')
    with pytest.raises(DamagedDataError):
        DeviceLedger(storage(tmp_path / "b")).entries()


def test_torn_last_line_is_removed(tmp_path: Path) -> None:
    lines = journal_with_rounds(tmp_path, 2)
    (tmp_path / "store" / JOURNAL).write_bytes(b"".join(lines) + lines[-1][:20])
    ledger = DeviceLedger(storage(tmp_path))
    assert len(ledger.entries()) == 2
    ledger.reserve(replace(FIRST, round=3), free)
    assert len(DeviceLedger(storage(tmp_path)).entries()) == 3


def test_header_stores_key_proof_and_state() -> None:
    seal = EncryptionHeader.read(EncryptionHeader.create(SECRET, ENCRYPTING).to_json(), "sealed")
    seal.check(SECRET, "sealed")
    for other, key in (
        (seal, bytes(32)),
        (EncryptionHeader(seal.store, ENCRYPTED, seal.proof), SECRET),
        (EncryptionHeader("x", ENCRYPTING, seal.proof), SECRET),
    ):
        with pytest.raises(AntherError, match="another key"):
            other.check(key, "sealed")
    for data in (b"", b"{}", b"[]", b'{"format": 2}', seal.to_json().replace(b"sealing", b"open"), seal.to_json()[:-9]):
        with pytest.raises(AntherError, match="sealed: can't be read"):
            EncryptionHeader.read(data, "sealed")


def test_sealed_reply_is_verified(tmp_path: Path) -> None:
    ledger = DeviceLedger(storage(tmp_path))
    ledger.reserve(FIRST, free)
    ledger.seal(FIRST, b"reply")
    (reply,) = (tmp_path / "store" / "outbox").iterdir()
    data = reply.read_bytes()
    reply.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(AntherError, match="not encrypted"):
        ledger.sealed(KEY, PLAN)
