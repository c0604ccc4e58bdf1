"""The parts of a base, so that it can be carried piece by piece and each be checked: files, and chunks of 4 MiB.

Whoever wants a base knows its content hash (`models.base.assets.digest`). That follows from the names and hashes of its
files, so a manifest is held against it before a byte of content is asked for. Hashes of chunks are the sender's word:
they find a broken chunk early, and a whole file is held against its own hash all the same. A manifest may come from
anybody, so it is limited and its names are checked before they name anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import AntherError
from models.base import assets

FORMAT = 1
CHUNK = 4 << 20  # bytes
MAX_MANIFEST_BYTES = 8 << 20  # bytes of a manifest
MOST_FILES, MOST_BYTES, DEEPEST = 4096, 256 << 30, 8

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,119}")  # one part of a name: no '..', nothing hidden, no separator


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a base."""

    name: str  # relative to the base, with '/' between its parts
    size: int  # bytes
    sha256: str
    chunks: tuple[str, ...]  # SHA-256 of each

    def span(self, index: int) -> tuple[int, int]:
        """Offset and length of a chunk in bytes."""
        offset = index * CHUNK
        return offset, min(CHUNK, self.size - offset)

    def verify(self, index: int, data: bytes) -> bool:
        """Whether this is the chunk."""
        return len(data) == self.span(index)[1] and hashlib.sha256(data).hexdigest() == self.chunks[index]


@dataclass(frozen=True, slots=True)
class ChunkManifest:
    """All files that make a base what it is."""

    base: str  # its content hash
    name: str  # of its folder
    files: tuple[ManifestFile, ...]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def encode(self) -> bytes:
        """As JSON, for `decode_manifest`."""
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()


def build(folder: Path) -> ChunkManifest:
    """The manifest of a base that lies here; every byte of it is read.

    Raises:
        AntherError: it can't be read, or has files that nobody would take.
    """
    try:
        files = [
            _part(file.relative_to(folder).as_posix(), file)
            for file in sorted(assets.identity_files(folder), key=lambda file: file.parts)
        ]
    except OSError as error:
        raise AntherError(f"base {folder}: can't be read ({error})") from error
    made = ChunkManifest(_combined(files), safe_name(folder), tuple(files))
    try:
        return decode_manifest(made.encode(), made.base)
    except AntherError as error:
        raise AntherError(f"base {folder}: can't be handed on: {error}") from error


def safe_name(folder: Path) -> str:
    """What a base's folder is called where it is copied to."""
    name = folder.absolute().name
    return name if _SAFE.fullmatch(name) else "base"


def verify(folder: Path, wanted: str) -> bool:
    """Whether a folder holds all of the base of this content hash, as it lies on the disk."""
    return assets.digest(folder) == wanted


def decode_manifest(data: bytes, wanted: str) -> ChunkManifest:
    """The manifest of the base of this content hash, from whoever sent it.

    Raises:
        AntherError: it is of another base, breaks a limit, or names what no base may.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise AntherError(f"the manifest of base {wanted[:12]} is longer than {MAX_MANIFEST_BYTES >> 20} MiB")
    try:
        told = json.loads(data)
        if not (isinstance(told, dict) and told.keys() == {"format", "base", "name", "files"}):
            raise ValueError("other keys")
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']!r}, this version knows {FORMAT}")
        if not (isinstance(told["files"], list) and 0 < len(told["files"]) <= MOST_FILES):
            raise ValueError(f"not 1 to {MOST_FILES} files")
        files = tuple(_checked(entry) for entry in told["files"])
        _check_names([file.name for file in files])
        if not _is_safe(told["name"]):
            raise ValueError(f"name {str(told['name'])[:80]!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise AntherError(f"the manifest of base {wanted[:12]} can't be taken: {error}") from None
    made = ChunkManifest(wanted, told["name"], files)
    if made.total > MOST_BYTES:
        raise AntherError(f"the manifest of base {wanted[:12]} names more than {MOST_BYTES >> 30} GiB")
    if not told["base"] == wanted == _combined(files):
        raise AntherError(f"the manifest of base {wanted[:12]} is of another one: its files don't come to that hash")
    return made


def _checked(entry: Any) -> ManifestFile:
    """One file as told; ValueError for what no base may have."""
    if not (isinstance(entry, dict) and entry.keys() == {"name", "size", "sha256", "chunks"}):
        raise ValueError("a file with other keys")
    name, size, chunks = entry["name"], entry["size"], entry["chunks"]
    shown = repr(str(name)[:80])
    if not (isinstance(name, str) and name.count("/") < DEEPEST and all(map(_is_safe, name.split("/")))):
        raise ValueError(f"file {shown}: a name that could lead elsewhere")
    if not assets.is_identity_file(Path(name)):
        raise ValueError(f"file {shown}: of a kind that doesn't make a base")
    if type(size) is not int or not 0 <= size <= MOST_BYTES:
        raise ValueError(f"file {shown}: its size")
    if not (isinstance(chunks, list) and len(chunks) == -(-size // CHUNK)):
        raise ValueError(f"file {shown}: not a hash for each chunk")
    if not all(isinstance(found, str) and assets.is_hash(found) for found in (entry["sha256"], *chunks)):
        raise ValueError(f"file {shown}: not a SHA-256")
    return ManifestFile(name, size, entry["sha256"], tuple(chunks))


def _check_names(names: list[str]) -> None:
    """ValueError for names of which not all can be files of one folder, on whatever disk."""
    folded = [name.lower() for name in names]
    if len(set(folded)) < len(folded):
        raise ValueError("two files of one name")
    folders = {str(folder) for name in folded for folder in PurePosixPath(name).parents}
    if both := folders.intersection(folded):
        raise ValueError(f"{min(both)!r} is a file and a folder")


def _is_safe(part: object) -> bool:
    return isinstance(part, str) and _SAFE.fullmatch(part) is not None


def _part(name: str, file: Path) -> ManifestFile:
    whole, chunks, size = hashlib.sha256(), [], 0
    for chunk in _read(file):
        whole.update(chunk)
        chunks.append(hashlib.sha256(chunk).hexdigest())
        size += len(chunk)
    return ManifestFile(name, size, whole.hexdigest(), tuple(chunks))


def _read(file: Path) -> Iterator[bytes]:
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            yield chunk


def _combined(files: list[ManifestFile] | tuple[ManifestFile, ...]) -> str:
    return assets.combined_digest((file.name, file.sha256) for file in files)
