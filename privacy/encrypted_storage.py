"""Encryption at rest of a device's store: AES-256-GCM around `FileStorage`, with the key stored elsewhere.

Each blob, each line of a journal and each head is encrypted separately, with the store's id, its name and, for a line,
its number as associated data: none can be changed or swapped without detection. A rollback of the whole store is
detected by the ledger's anchors, as without encryption.

*Not covered*: names and sizes of files; policy.toml, which its owner edits; the marker `enrolled`, which holds an id
and a path; previews, which the owner looks at; the pictures themselves, which stay in the owner's folder;
and copies of this process' memory in swap or in a dump. Anyone who can run code as the owner while the key is available
reads everything: encryption protects a card or a disk that is taken away.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from common.errors import AntherError
from privacy.storage import FileStorage, Journal

# Stored values of these constants can't change: existing stores use them.
HEADER_FILE = "sealed"  # if it exists, the store is encrypted; its content identifies the key
ENCRYPTING, ENCRYPTED = "sealing", "sealed"
KEY_BYTES = 32
BLOB, LINE, HEAD = "blob", "line", "head"

_MAGIC, _LINE = b"anther sealed 1\n", b"~"  # JSON and safetensors begin with other bytes
_NONCE = 12


class DamagedDataError(AntherError, ValueError):
    """Raised for data that was not encrypted under this key and name.

    Also a ValueError, for callers that can recover the data.
    """


@dataclass(frozen=True, slots=True)
class EncryptionHeader:
    """Header of a store that is encrypted, or being encrypted. Stored in plaintext as `sealed`."""

    store: str  # random id, so that data of another store under the same key is rejected
    state: str  # ENCRYPTING until all existing data is encrypted
    proof: str  # authentication tag that verifies a key

    @staticmethod
    def create(key: bytes, state: str, store: str | None = None) -> EncryptionHeader:
        """Create a header for a new state of a store.

        Args:
            key: the store's key, `KEY_BYTES` bytes.
            state: `ENCRYPTING` or `ENCRYPTED`.
            store: id of the store. None: a new random one.
        """
        store = store or secrets.token_hex(16)
        nonce = secrets.token_bytes(_NONCE)
        return EncryptionHeader(
            store, state, (nonce + AESGCM(key).encrypt(nonce, b"", _associated_data(store, state))).hex()
        )

    @staticmethod
    def read(data: bytes, where: str) -> EncryptionHeader:
        """Parse the result of `to_json`; AntherError for anything else."""
        try:
            fields = json.loads(data)
            if fields["format"] != 1 or fields["state"] not in (ENCRYPTING, ENCRYPTED):
                raise ValueError("another version")
            return EncryptionHeader(str(fields["store"]), fields["state"], bytes.fromhex(fields["proof"]).hex())
        except (ValueError, KeyError, TypeError) as error:
            raise AntherError(f"{where}: can't be read ({error}): restore it from a backup of the store") from None

    def to_json(self) -> bytes:
        return json.dumps({"format": 1, "store": self.store, "state": self.state, "proof": self.proof}).encode()

    def check(self, key: bytes, where: str) -> None:
        """Raise AntherError unless `key` is the key of this store."""
        proof = bytes.fromhex(self.proof)
        try:
            AESGCM(key).decrypt(proof[:_NONCE], proof[_NONCE:], _associated_data(self.store, self.state))
        except (InvalidTag, ValueError):
            raise AntherError(
                f"{where}: the store was encrypted with another key than the configured one: restore that key"
            ) from None


class StoreCipher:
    """Cipher of the data of one store.

    Every nonce is random: good for 2³² messages under one key, more than a device writes in its lifetime.
    """

    def __init__(self, key: bytes, store: str) -> None:
        self._cipher, self._store = AESGCM(key), store

    def encrypt(self, data: bytes, *context: object) -> bytes:
        """Encrypt `data` with `context` as associated data."""
        nonce = secrets.token_bytes(_NONCE)
        return _MAGIC + nonce + self._cipher.encrypt(nonce, data, _associated_data(self._store, *context))

    def decrypt(self, data: bytes, where: str, *context: object) -> bytes:
        """Decrypt data that was encrypted with the same context; DamagedDataError for anything else.

        Args:
            data: ciphertext.
            where: location of the data, for the message.
            context: associated data.
        """
        body = data.removeprefix(_MAGIC)
        try:
            if len(body) == len(data):
                raise InvalidTag
            return self._cipher.decrypt(body[:_NONCE], body[_NONCE:], _associated_data(self._store, *context))
        except (InvalidTag, ValueError):
            raise DamagedDataError(
                f"{where}: not encrypted under this key and name: it was damaged or swapped; restore it from a backup"
            ) from None

    def encrypt_line(self, line: bytes, name: str, number: int) -> bytes:
        """Encrypt one line of a journal to one line.

        Args:
            line: plaintext.
            name: name of the journal.
            number: number of the line, from 1.
        """
        sealed = self.encrypt(line, LINE, name, number).removeprefix(_MAGIC)
        return _LINE + base64.b64encode(sealed)

    def decrypt_line(self, line: bytes, where: str, name: str, number: int) -> bytes:
        """Inverse of `encrypt_line`; DamagedDataError for anything else.

        Args:
            line: encrypted line.
            where: location of the journal, for the message.
            name: name of the journal.
            number: number of the line, from 1.
        """
        try:
            body = base64.b64decode(line.removeprefix(_LINE), validate=True)
        except ValueError:
            body = b""
        return self.decrypt((_MAGIC if is_encrypted(line) else b"") + body, f"{where}:{number}", LINE, name, number)


def is_encrypted(data: bytes) -> bool:
    """Whether a blob, head or line begins like an encrypted one."""
    return data.startswith((_MAGIC, _LINE))


class EncryptedStorage:
    """Encrypted storage of one device, around a `FileStorage`.

    Args:
        files: the underlying storage.
        cipher: cipher of the store.
        is_plaintext: whether the blob of a given name is stored in plaintext.

    Raises:
        DamagedDataError: data was read that was not encrypted under its key and name.
    """

    def __init__(self, files: FileStorage, cipher: StoreCipher, is_plaintext: Callable[[str], bool]) -> None:
        self._files, self._cipher, self._is_plaintext = files, cipher, is_plaintext

    def read(self, name: str) -> bytes | None:
        data = self._files.read(name)
        return (
            data
            if data is None or self._is_plaintext(name)
            else self._cipher.decrypt(data, self.where(name), BLOB, name)
        )

    def write(self, name: str, data: bytes) -> None:
        self._files.write(name, data if self._is_plaintext(name) else self._cipher.encrypt(data, BLOB, name))

    def remove(self, name: str) -> None:
        self._files.remove(name)

    @contextmanager
    def journal(self, name: str) -> Iterator[Journal]:
        with self._files.journal(name) as journal:
            yield _EncryptedJournal(journal, self._cipher, name, self.where(name))

    def where(self, name: str) -> str:
        return self._files.where(name)


class _EncryptedJournal:
    def __init__(self, journal: Journal, cipher: StoreCipher, name: str, where: str) -> None:
        self._journal, self._cipher, self._name = journal, cipher, name
        self.head_location = journal.head_location
        self.lines: Sequence[bytes] = [
            cipher.decrypt_line(line, where, name, number) for number, line in enumerate(journal.lines, start=1)
        ]
        self._count = len(self.lines)

    @property
    def head(self) -> bytes | None:
        data = self._journal.head
        return None if data is None else self._cipher.decrypt(data, self.head_location, HEAD, self._name)

    def append(self, line: bytes) -> None:
        self._journal.append(self._cipher.encrypt_line(line, self._name, self._count + 1))
        self._count += 1

    def write_head(self, head: bytes) -> None:
        self._journal.write_head(self._cipher.encrypt(head, HEAD, self._name))


def _associated_data(*parts: object) -> bytes:
    """Encode associated data injectively, i.e. so that different data have different encodings."""
    return hashlib.sha256(json.dumps(["anther", *parts]).encode()).digest()
