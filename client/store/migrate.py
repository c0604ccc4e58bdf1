"""A store of an earlier version, or one that is to be encrypted, is brought to what this version reads.

Step by step, each of which comes to the same when it is done again: whenever it is killed, the next opening goes on.
Whoever calls holds the store's lock.
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

_WHOLE = b"\n"


def _from_0(files: FileStorage) -> None:
    """Stores had no version. All that they hold belongs to no federation with an id, and lies where that does."""


STEPS: tuple[Callable[[FileStorage], None], ...] = (_from_0,)
"""From each version to the next."""


def version(files: FileStorage) -> int:
    """Of the store that lies there; 0 for one of before there were any, or for none.

    Raises:
        AntherError: it is of a newer version, or says nothing of the kind.
    """
    data = files.read(VERSION)
    if data is None:
        return 0
    if not data.strip().isdigit():
        raise AntherError(f"{files.where(VERSION)}: not a version: restore it from a backup of the store")
    if (found := int(data)) > len(STEPS):
        raise AntherError(
            f"{files.folder}: the store is of version {found}, and this Anther knows {len(STEPS)}: update Anther, or "
            "give it another store"
        )
    return found


def upgrade(files: FileStorage) -> None:
    """Bring a store to this version. AntherError as `version`."""
    found = version(files)
    _tidy(files)
    for number in range(found, len(STEPS)):
        STEPS[number](files)
        files.write(VERSION, f"{number + 1}\n".encode())


def seal(files: FileStorage, key: bytes) -> EncryptionHeader:
    """Encrypt what is there and isn't yet: after this every look at it needs the key.

    The seal says first that it has begun, so that from then on nothing is done without the key, and at last that it is
    done, so that from then on nothing in the open is believed.

    Raises:
        AntherError: it was begun with another key.
    """
    if (data := files.read(HEADER_FILE)) is None:
        begun = EncryptionHeader.create(key, ENCRYPTING)
        files.write(HEADER_FILE, begun.to_json())
    else:
        begun = EncryptionHeader.read(data, files.where(HEADER_FILE))
        begun.check(key, files.where(HEADER_FILE))
    if begun.state == ENCRYPTED:
        return begun
    cipher = StoreCipher(key, begun.store)
    with files.journal(JOURNAL) if (files.folder / JOURNAL).exists() else nullcontext():  # none may mend it meanwhile
        for name in layout.private(files.folder):
            data = files.read(name) or b""
            if not is_encrypted(data):
                files.write(name, _sealed(cipher, name, data))
        for head, journal in _heads(files):
            if not is_encrypted(data := head.read_bytes()):
                atomic_files.write(head, cipher.encrypt(data, HEAD, journal))
    done = EncryptionHeader.create(key, ENCRYPTED, begun.store)
    files.write(HEADER_FILE, done.to_json())
    return done


def in_the_open(files: FileStorage) -> bool:
    """Whether nothing of it looks encrypted, here or in the ledger's head; what was set aside may be."""
    names = (name for name in layout.private(files.folder) if layout.original(name) == name)
    paths = [files.folder / name for name in names] + [head for head, _ in _heads(files) if head.parent == files.heads]
    return not any(is_encrypted(_begin(path)) for path in paths)


def _sealed(cipher: StoreCipher, name: str, data: bytes) -> bytes:
    """A blob, or all lines of a journal; a torn last line is left out, as whoever opens it would cut it off."""
    original = layout.original(name)
    if original != JOURNAL:
        return cipher.encrypt(data, BLOB, original)
    lines = data[: data.rfind(_WHOLE) + 1].splitlines()
    return b"".join(cipher.encrypt_line(line, original, number) + _WHOLE for number, line in enumerate(lines, start=1))


def _heads(files: FileStorage) -> list[tuple[Path, str]]:
    """Heads that are there, and of which journal."""
    aside = sorted(files.folder.glob(f"{layout.ASIDE}-*/{ASIDE_HEAD}"))
    return [(head, JOURNAL) for head in (files.heads / JOURNAL, *aside) if head.exists()]


def _tidy(files: FileStorage) -> None:
    """Remove what killed writes have left: nobody reads it, and it holds what the owner may want gone."""
    for path in layout.unfinished(files.folder):
        path.unlink(missing_ok=True)


def _begin(file: Path) -> bytes:
    with file.open("rb") as content:
        return content.read(32)
