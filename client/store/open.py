"""How a device's store is opened: by one process for as long as it lives, or by its owner's commands for a look.

Opening brings it to this version, and encrypts it where that is asked for and a key is kept (`client.store.keyring`). A store
that is encrypted and whose key is gone is refused: to begin anew would begin its ledger anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from client.store import keyring, layout, migrate
from client.store.layout import FEDERATION
from common import file_lock
from common.errors import AntherError
from privacy.encrypted_storage import ENCRYPTED, HEADER_FILE, EncryptedStorage, EncryptionHeader, StoreCipher
from privacy.storage import FileStorage, Storage

if TYPE_CHECKING:
    from client.store.store import Store

GIVE_UP = "without it, give up all that is there: anther device ledger reset --forget"
AS_IT_IS, AUTO, ALWAYS, NEVER = "as it is", "auto", "always", "never"


@dataclass(frozen=True)
class OpenStore:
    """A device's store: its files, what is read and written through, and the federation whose part is meant."""

    files: FileStorage
    storage: Storage
    federation: str | None

    @cached_property
    def store(self) -> Store:
        from client.store.store import Store  # slow import, so only here

        return Store(self.storage, self.federation)


@contextmanager
def open_store(files: FileStorage, *, encrypt: str = AS_IT_IS, federation: str | None = None) -> Iterator[OpenStore]:
    """Within this context the store is this process' alone, of this version, and encrypted as asked.

    Args:
        encrypt: `conf.schemas.node.Storage.encrypt`; as it is: neither begun nor ended here.
        federation: the id of the one that the device is in now; None: the one that it was in last.

    Raises:
        AntherError: another process has it, it is of a newer version, its key is missing or another, or
            storage.encrypt can't be kept.
    """
    prefix = layout.federation_prefix(federation)
    with file_lock.exclusive(files.folder, what="the store"):
        migrate.upgrade(files)
        storage = _unlocked(files, encrypt)
        if prefix and federation != last_federation(files):
            files.write(FEDERATION, f"{federation}\n".encode())
        yield OpenStore(files, storage, last_federation(files))


@contextmanager
def open_for_owner(files: FileStorage) -> Iterator[OpenStore]:
    """For an owner's command that writes: as `open_store`, of a store that is there."""
    check_store_exists(files)
    with open_store(files) as found:
        yield found


def check_store_exists(files: FileStorage) -> None:
    """Raises AntherError unless there is a store."""
    if not files.folder.is_dir():
        raise AntherError(f"{files.folder}: there is no store here: say --store or --name")


def inspect_store(files: FileStorage) -> OpenStore:
    """The store as it is, for who reads, and for what mends itself under locks of its own: the ledger.

    Raises:
        AntherError: as `open_store`, but for another process that has it.
    """
    migrate.version(files)
    data = files.read(HEADER_FILE)
    if data is not None and EncryptionHeader.read(data, files.where(HEADER_FILE)).state != ENCRYPTED:
        with open_store(files) as finished:
            return finished
    return OpenStore(files, _unlocked(files, AS_IT_IS), last_federation(files))


def last_federation(files: FileStorage) -> str | None:
    """The one that the device was in last; None: none with an id."""
    data = files.read(FEDERATION)
    if data is None:
        return None
    found = data.decode(errors="replace").strip()
    try:
        layout.federation_prefix(found)
    except AntherError as error:
        raise AntherError(f"{files.where(FEDERATION)}: {error}") from None
    return found


def _unlocked(files: FileStorage, encrypt: str) -> Storage:
    """What the files are read and written through."""
    key, has_seal = keyring.find(), files.read(HEADER_FILE) is not None
    if not has_seal:
        if not migrate.in_the_open(files):
            raise AntherError(
                f"{files.where(HEADER_FILE)}: missing, and the store is encrypted: restore it from a backup; {GIVE_UP}"
            )
        if encrypt == ALWAYS and key is None:
            raise AntherError(f"storage.encrypt=always: {keyring.NONE}")
        if key is None or encrypt in (AS_IT_IS, NEVER):
            return files
    elif key is None:
        raise AntherError(f"{files.folder}: the store is encrypted, and {keyring.NONE}; {GIVE_UP}")
    elif encrypt == NEVER:
        raise AntherError(f"storage.encrypt=never: {files.folder} is encrypted already: leave it out")
    seal = migrate.seal(files, key)
    return EncryptedStorage(files, StoreCipher(key, seal.store), layout.is_plaintext)
