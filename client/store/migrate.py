"""Upgrade a store of an earlier version, and encrypt a store in place.

Each step is idempotent: if the process is killed, the next opening continues. The caller holds the store's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from client.store import layout
from client.store.layout import VERSION
from common import atomic_files
from common.errors import AntherError
from privacy.encrypted_storage import (
    BLOB,
    ENCRYPTED,
    ENCRYPTING,
    HEAD,
    HEADER_FILE,
    EncryptionHeader,
    StoreCipher,
    is_encrypted,
)
from privacy.ledger.ledger import JOURNAL
from privacy.storage import HEAD as ASIDE_HEAD
from privacy.storage import FileStorage

_LINE_END = b"\n"


def _from_0(files: FileStorage) -> None:
    """Upgrade a store without a version. Its files belong to no federation with an id, so none is moved."""


STEPS: tuple[Callable[[FileStorage], None], ...] = (_from_0,)
"""The n-th function upgrades version n to n + 1."""


def version(files: FileStorage) -> int:
    """Return the store's version; 0 for a store from before versions existed, or none.

    Raises:
        AntherError: the version is newer than this code's, or not a number.
    """
    data = files.read(VERSION)
    if data is None:
        return 0
    if not data.strip().isdigit():
        raise AntherError(f"{files.where(VERSION)}: not a version number; restore this file from a backup of the store")
    if (number := int(data)) > len(STEPS):
        raise AntherError(
            f"{files.folder}: the store has version {number}, and this Anther supports up to {len(STEPS)}: update "
            "Anther, or use another store"
        )
    return number


def upgrade(files: FileStorage) -> None:
    """Upgrade a store to this version; AntherError as in `version`."""
    current = version(files)
    _remove_temporary_files(files)
    for number in range(current, len(STEPS)):
        STEPS[number](files)
        files.write(VERSION, f"{number + 1}\n".encode())


def seal(files: FileStorage, key: bytes) -> EncryptionHeader:
    """Encrypt all private files that aren't encrypted yet.

    The header file is written twice: first with the state ENCRYPTING, after which the store can't be opened without the
    key; last with the state ENCRYPTED, after which unencrypted data is not trusted.

    Raises:
        AntherError: encryption was begun with another key.
    """
    if (data := files.read(HEADER_FILE)) is None:
        header = EncryptionHeader.create(key, ENCRYPTING)
        files.write(HEADER_FILE, header.to_json())
    else:
        header = EncryptionHeader.read(data, files.where(HEADER_FILE))
        header.check(key, files.where(HEADER_FILE))
    if header.state == ENCRYPTED:
        return header
    cipher = StoreCipher(key, header.store)
    has_journal = (files.folder / JOURNAL).exists()
    with files.journal(JOURNAL) if has_journal else nullcontext():  # the journal must not be repaired meanwhile
        for name in layout.private_files(files.folder):
            data = files.read(name) or b""
            if not is_encrypted(data):
                files.write(name, _sealed(cipher, name, data))
        for head, journal in _chain_heads(files):
            if not is_encrypted(data := head.read_bytes()):
                atomic_files.write(head, cipher.encrypt(data, HEAD, journal))
    complete = EncryptionHeader.create(key, ENCRYPTED, header.store)
    files.write(HEADER_FILE, complete.to_json())
    return complete


def is_unencrypted(files: FileStorage) -> bool:
    """Return whether nothing in the store or in the ledger's head looks encrypted; files set aside are ignored."""
    names = (name for name in layout.private_files(files.folder) if layout.original_name(name) == name)
    paths = [files.folder / name for name in names] + [
        head for head, _ in _chain_heads(files) if head.parent == files.heads
    ]
    return not any(is_encrypted(_first_bytes(path)) for path in paths)


def _sealed(cipher: StoreCipher, name: str, data: bytes) -> bytes:
    """Encrypt a file, or each line of a journal; a torn last line is dropped, as opening the journal would drop it.

    Args:
        cipher: the store's cipher.
        name: the file's name in the store.
        data: its content.
    """
    original = layout.original_name(name)
    if original != JOURNAL:
        return cipher.encrypt(data, BLOB, original)
    lines = data[: data.rfind(_LINE_END) + 1].splitlines()
    return b"".join(
        cipher.encrypt_line(line, original, number) + _LINE_END for number, line in enumerate(lines, start=1)
    )


def _chain_heads(files: FileStorage) -> list[tuple[Path, str]]:
    """List the existing heads of the ledger's hash chain, each with the name of its journal."""
    aside = sorted(files.folder.glob(f"{layout.ASIDE}-*/{ASIDE_HEAD}"))
    return [(head, JOURNAL) for head in (files.heads / JOURNAL, *aside) if head.exists()]


def _remove_temporary_files(files: FileStorage) -> None:
    """Remove temporary files of writes that were killed.

    They are never read, and may contain data that the owner wants deleted.
    """
    for path in layout.temporary_files(files.folder):
        path.unlink(missing_ok=True)


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as content:
        return content.read(32)
