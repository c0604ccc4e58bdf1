"""Open a device's store: exclusively by one process for its lifetime, or read-only by the owner's commands.

Opening upgrades the store to this version, and encrypts it if that is configured and a key exists
(`client.store.keyring`). An encrypted store whose key is missing is refused: starting a new store would start a new
ledger.
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

GIVE_UP = "without it the stored data is lost; to start over: anther device ledger reset --forget"
AS_IT_IS, AUTO, ALWAYS, NEVER = "as it is", "auto", "always", "never"


@dataclass(frozen=True)
class OpenStore:
    """An open store: its files, its (possibly encrypted) storage, and the federation that it is opened for."""

    files: FileStorage
    storage: Storage
    federation: str | None

    @cached_property
    def store(self) -> Store:
        """Typed access to the storage."""
        from client.store.store import Store  # slow import, so only here

        return Store(self.storage, self.federation)


@contextmanager
def open_store(files: FileStorage, *, encrypt: str = AS_IT_IS, federation: str | None = None) -> Iterator[OpenStore]:
    """Lock the store for this process, upgrade it, and encrypt it if configured; the lock is released on exit.

    Args:
        files: the store's files.
        encrypt: `conf.schemas.node.StorageConfig.encrypt`; `as it is`: neither start nor end encryption.
        federation: id of the federation that the device is in now; None: the last one.

    Raises:
        AntherError: another process uses the store, its version is newer, its key is missing or wrong, or
            storage.encrypt contradicts its state.
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
    """Open an existing store for an owner's command that writes."""
    check_store_exists(files)
    with open_store(files) as store:
        yield store


def check_store_exists(files: FileStorage) -> None:
    """Raise AntherError unless the store exists."""
    if not files.folder.is_dir():
        raise AntherError(f"{files.folder}: no store in this folder; use --store or --name")


def inspect_store(files: FileStorage) -> OpenStore:
    """Open the store for reading, without an exclusive lock; the ledger's journal is repaired under its own lock.

    Raises:
        AntherError: as `open_store`, except that another process may use the store.
    """
    migrate.version(files)
    data = files.read(HEADER_FILE)
    if data is not None and EncryptionHeader.read(data, files.where(HEADER_FILE)).state != ENCRYPTED:
        with open_store(files) as finished:
            return finished
    return OpenStore(files, _unlocked(files, AS_IT_IS), last_federation(files))


def last_federation(files: FileStorage) -> str | None:
    """Return the id of the device's last federation; None: it had none."""
    data = files.read(FEDERATION)
    if data is None:
        return None
    federation = data.decode(errors="replace").strip()
    try:
        layout.federation_prefix(federation)
    except AntherError as error:
        raise AntherError(f"{files.where(FEDERATION)}: {error}") from None
    return federation


def _unlocked(files: FileStorage, encrypt: str) -> Storage:
    """Return the storage through which the files are read and written."""
    key, has_header = keyring.find_key(), files.read(HEADER_FILE) is not None
    if not has_header:
        if not migrate.is_unencrypted(files):
            raise AntherError(
                f"{files.where(HEADER_FILE)}: missing, but the store is encrypted: restore it from a backup; {GIVE_UP}"
            )
        if encrypt == ALWAYS and key is None:
            raise AntherError(f"storage.encrypt=always: {keyring.NO_KEY}")
        if key is None or encrypt in (AS_IT_IS, NEVER):
            return files
    elif key is None:
        raise AntherError(f"{files.folder}: the store is encrypted, but {keyring.NO_KEY}; {GIVE_UP}")
    elif encrypt == NEVER:
        raise AntherError(f"storage.encrypt=never: {files.folder} is already encrypted; remove this setting")
    seal = migrate.seal(files, key)
    return EncryptedStorage(files, StoreCipher(key, seal.store), layout.is_plaintext)
