"""What a device keeps, encrypted as it lies on the disk: AES-256-GCM around `FileStorage`, under a key that lies elsewhere.

Each blob, each line of a journal and each head is sealed by itself, together with the store's id, its name and, for a
line, its number: none can be changed, or put in the place of another, without being found out. That all of it was
taken back to an earlier state the ledger's anchors tell, as they do without encryption.

*Not covered*: what is there and how large it is; policy.toml, which its owner writes by hand; the marker `enrolled`,
which holds an id and a path; previews, which are there to be looked at; the pictures themselves, which lie where their
owner put them; and what the system keeps of this process' memory, in swap or in a dump. Whoever can run code as the
owner while the key is there reads all of it: it is for a card or a disk that is taken away.
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

HEADER_FILE = "sealed"  # the file that says that a store is encrypted, and with which key
ENCRYPTING, ENCRYPTED = "sealing", "sealed"
KEY_BYTES = 32  # bytes
BLOB, LINE, HEAD = "blob", "line", "head"

_MAGIC, _LINE = b"anther sealed 1\n", b"~"  # JSON and safetensors begin otherwise
_NONCE = 12


class DamagedDataError(AntherError, ValueError):
    """It isn't what was sealed under this key and name. A ValueError too: what can be found again is."""


@dataclass(frozen=True, slots=True)
class EncryptionHeader:
    """That a store is encrypted, or about to be: kept in it, in the open, as `sealed`."""

    store: str  # drawn at random, so that nothing of another store under the same key is taken for this one's
    state: str  # SEALING until all that was there before is encrypted
    proof: str  # that a key is the one

    @staticmethod
    def create(key: bytes, state: str, store: str | None = None) -> EncryptionHeader:
        store = store or secrets.token_hex(16)
        nonce = secrets.token_bytes(_NONCE)
        return EncryptionHeader(store, state, (nonce + AESGCM(key).encrypt(nonce, b"", _about(store, state))).hex())

    @staticmethod
    def read(data: bytes, where: str) -> EncryptionHeader:
        """Raises AntherError for what `to_json` hasn't written."""
        try:
            told = json.loads(data)
            if told["format"] != 1 or told["state"] not in (ENCRYPTING, ENCRYPTED):
                raise ValueError("of another version")
            return EncryptionHeader(str(told["store"]), told["state"], bytes.fromhex(told["proof"]).hex())
        except (ValueError, KeyError, TypeError) as error:
            raise AntherError(f"{where}: can't be read ({error}): restore it from a backup of the store") from None

    def to_json(self) -> bytes:
        return json.dumps({"format": 1, "store": self.store, "state": self.state, "proof": self.proof}).encode()

    def check(self, key: bytes, where: str) -> None:
        """Raises AntherError for another key than the store was encrypted with."""
        proof = bytes.fromhex(self.proof)
        try:
            AESGCM(key).decrypt(proof[:_NONCE], proof[_NONCE:], _about(self.store, self.state))
        except (InvalidTag, ValueError):
            raise AntherError(
                f"{where}: the store was encrypted with another key than the one there is: bring that one back"
            ) from None


class StoreCipher:
    """Seals and opens what belongs to one store.

    A nonce is drawn for each: up to 2³² of them under one key, which a device doesn't come to in its life.
    """

    def __init__(self, key: bytes, store: str) -> None:
        self._cipher, self._store = AESGCM(key), store

    def seal(self, data: bytes, *about: object) -> bytes:
        nonce = secrets.token_bytes(_NONCE)
        return _MAGIC + nonce + self._cipher.encrypt(nonce, data, _about(self._store, *about))

    def open(self, data: bytes, where: str, *about: object) -> bytes:
        """Raises Damaged for anything but what was sealed as this."""
        body = data.removeprefix(_MAGIC)
        try:
            if len(body) == len(data):
                raise InvalidTag
            return self._cipher.decrypt(body[:_NONCE], body[_NONCE:], _about(self._store, *about))
        except (InvalidTag, ValueError):
            raise DamagedDataError(
                f"{where}: not what was sealed under this key and name: it was damaged or swapped; restore it from a "
                "backup"
            ) from None

    def seal_line(self, line: bytes, name: str, number: int) -> bytes:
        """A line of a journal as one line."""
        sealed = self.seal(line, LINE, name, number).removeprefix(_MAGIC)
        return _LINE + base64.b64encode(sealed)

    def open_line(self, line: bytes, where: str, name: str, number: int) -> bytes:
        try:
            body = base64.b64decode(line.removeprefix(_LINE), validate=True)
        except ValueError:
            body = b""
        return self.open((_MAGIC if is_encrypted(line) else b"") + body, f"{where}:{number}", LINE, name, number)


def is_encrypted(data: bytes) -> bool:
    """Whether a blob, a head or a line begins as a sealed one does."""
    return data.startswith((_MAGIC, _LINE))


class EncryptedStorage:
    """The encrypted storage of one device: `FileStorage` whose content is sealed.

    Args:
        is_plaintext: whether the blob of a name is not.

    Raises:
        Damaged: from any look at what is not as it was sealed.
    """

    def __init__(self, files: FileStorage, box: StoreCipher, is_plaintext: Callable[[str], bool]) -> None:
        self._files, self._box, self._is_plaintext = files, box, is_plaintext

    def read(self, name: str) -> bytes | None:
        data = self._files.read(name)
        return data if data is None or self._is_plaintext(name) else self._box.open(data, self.where(name), BLOB, name)

    def write(self, name: str, data: bytes) -> None:
        self._files.write(name, data if self._is_plaintext(name) else self._box.seal(data, BLOB, name))

    def remove(self, name: str) -> None:
        self._files.remove(name)

    @contextmanager
    def journal(self, name: str) -> Iterator[Journal]:
        with self._files.journal(name) as journal:
            yield _SealedJournal(journal, self._box, name, self.where(name))

    def where(self, name: str) -> str:
        return self._files.where(name)


class _SealedJournal:
    def __init__(self, journal: Journal, box: StoreCipher, name: str, where: str) -> None:
        self._journal, self._box, self._name = journal, box, name
        self.head_location = journal.head_location
        self.lines: Sequence[bytes] = [
            box.open_line(line, where, name, number) for number, line in enumerate(journal.lines, start=1)
        ]
        self._count = len(self.lines)

    @property
    def head(self) -> bytes | None:
        data = self._journal.head
        return None if data is None else self._box.open(data, self.head_location, HEAD, self._name)

    def append(self, line: bytes) -> None:
        self._journal.append(self._box.seal_line(line, self._name, self._count + 1))
        self._count += 1

    def write_head(self, head: bytes) -> None:
        self._journal.write_head(self._box.seal(head, HEAD, self._name))


def _about(*parts: object) -> bytes:
    """What is sealed along, with no two lists of parts alike."""
    return hashlib.sha256(json.dumps(["anther", *parts]).encode()).digest()
