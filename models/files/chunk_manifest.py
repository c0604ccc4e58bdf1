"""Manifest of a base's files and 4 MiB chunks, so that a base can be transferred and verified piece by piece.

The receiver of a base knows its content hash (`models.files.assets.digest`), which follows from the names and hashes of
its files. A manifest is checked against it before any content is requested. Chunk hashes are the sender's claim: they
detect a damaged chunk early, and every whole file is checked against its own hash regardless. A manifest is untrusted:
its size is limited, and its names are checked before any path is built from them.
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
from models.files import assets

FORMAT = 1
CHUNK = 4 << 20  # bytes
MAX_MANIFEST_BYTES = 8 << 20
MAX_FILES, MAX_BYTES, MAX_DEPTH = 4096, 256 << 30, 8

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,119}")  # one path component: no '..', nothing hidden, no separator


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """File of a base."""

    name: str  # relative to the base, with '/' between components
    size: int  # bytes
    sha256: str
    chunks: tuple[str, ...]  # SHA-256 of each

    def span(self, index: int) -> tuple[int, int]:
        """Return offset and length of a chunk in bytes."""
        offset = index * CHUNK
        return offset, min(CHUNK, self.size - offset)

    def verify(self, index: int, data: bytes) -> bool:
        """Return whether `data` is the chunk with this index."""
        return len(data) == self.span(index)[1] and hashlib.sha256(data).hexdigest() == self.chunks[index]


@dataclass(frozen=True, slots=True)
class ChunkManifest:
    """All files that determine a base's content hash."""

    base: str  # content hash
    name: str  # of the folder
    files: tuple[ManifestFile, ...]

    @property
    def total(self) -> int:
        """Total size of all files in bytes."""
        return sum(file.size for file in self.files)

    def encode(self) -> bytes:
        """Serialize as JSON, for `decode_manifest`."""
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()


def build(folder: Path) -> ChunkManifest:
    """Build the manifest of a local base; every byte of it is read.

    Raises:
        AntherError: a file can't be read, or breaks a limit that receivers check.
    """
    try:
        files = [
            _hash_file(file.relative_to(folder).as_posix(), file)
            for file in sorted(assets.identity_files(folder), key=lambda file: file.parts)
        ]
    except OSError as error:
        raise AntherError(f"base {folder}: can't be read ({error})") from error
    manifest = ChunkManifest(_combined(files), safe_name(folder), tuple(files))
    try:
        return decode_manifest(manifest.encode(), manifest.base)
    except AntherError as error:
        raise AntherError(f"base {folder}: can't be served to devices: {error}") from error


def safe_name(folder: Path) -> str:
    """Return the name for copies of a base's folder."""
    name = folder.absolute().name
    return name if _SAFE.fullmatch(name) else "base"


def verify(folder: Path, sha256: str) -> bool:
    """Return whether a folder on disk has this content hash."""
    return assets.digest(folder) == sha256


def decode_manifest(data: bytes, sha256: str) -> ChunkManifest:
    """Decode and validate an untrusted manifest of the base with this content hash.

    Raises:
        AntherError: it describes another base, breaks a limit, or has an unsafe name.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise AntherError(f"the manifest of base {sha256[:12]} is longer than {MAX_MANIFEST_BYTES >> 20} MiB")
    try:
        content = json.loads(data)
        if not (isinstance(content, dict) and content.keys() == {"format", "base", "name", "files"}):
            raise ValueError("other keys")
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version knows {FORMAT}")
        if not (isinstance(content["files"], list) and 0 < len(content["files"]) <= MAX_FILES):
            raise ValueError(f"not 1 to {MAX_FILES} files")
        files = tuple(_decode_file(entry) for entry in content["files"])
        _check_names([file.name for file in files])
        if not _is_safe(content["name"]):
            raise ValueError(f"name {str(content['name'])[:80]!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise AntherError(f"the manifest of base {sha256[:12]} is invalid: {error}") from None
    manifest = ChunkManifest(sha256, content["name"], files)
    if manifest.total > MAX_BYTES:
        raise AntherError(f"the manifest of base {sha256[:12]} lists more than {MAX_BYTES >> 30} GiB")
    if not content["base"] == sha256 == _combined(files):
        raise AntherError(f"the manifest of base {sha256[:12]} describes another base: its files have another hash")
    return manifest


def _decode_file(entry: Any) -> ManifestFile:
    """Decode and validate one file. ValueError if a field is invalid."""
    if not (isinstance(entry, dict) and entry.keys() == {"name", "size", "sha256", "chunks"}):
        raise ValueError("a file with other keys")
    name, size, chunks = entry["name"], entry["size"], entry["chunks"]
    shown = repr(str(name)[:80])
    if not (isinstance(name, str) and name.count("/") < MAX_DEPTH and all(map(_is_safe, name.split("/")))):
        raise ValueError(f"file {shown}: unsafe name")
    if not assets.is_identity_file(Path(name)):
        raise ValueError(f"file {shown}: not a kind of file that belongs to a base")
    if type(size) is not int or not 0 <= size <= MAX_BYTES:
        raise ValueError(f"file {shown}: invalid size")
    if not (isinstance(chunks, list) and len(chunks) == -(-size // CHUNK)):
        raise ValueError(f"file {shown}: needs one hash per chunk")
    if not all(isinstance(value, str) and assets.is_hash(value) for value in (entry["sha256"], *chunks)):
        raise ValueError(f"file {shown}: not a SHA-256")
    return ManifestFile(name, size, entry["sha256"], tuple(chunks))


def _check_names(names: list[str]) -> None:
    """Refuse names that can't all be files in one folder on every file system. ValueError if so."""
    folded = [name.lower() for name in names]
    if len(set(folded)) < len(folded):
        raise ValueError("two files of one name")
    folders = {str(folder) for name in folded for folder in PurePosixPath(name).parents}
    if conflicts := folders.intersection(folded):
        raise ValueError(f"{min(conflicts)!r} is a file and a folder")


def _is_safe(part: object) -> bool:
    return isinstance(part, str) and _SAFE.fullmatch(part) is not None


def _hash_file(name: str, file: Path) -> ManifestFile:
    file_hash, chunks, size = hashlib.sha256(), [], 0
    for chunk in _read(file):
        file_hash.update(chunk)
        chunks.append(hashlib.sha256(chunk).hexdigest())
        size += len(chunk)
    return ManifestFile(name, size, file_hash.hexdigest(), tuple(chunks))


def _read(file: Path) -> Iterator[bytes]:
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            yield chunk


def _combined(files: list[ManifestFile] | tuple[ManifestFile, ...]) -> str:
    return assets.combined_digest((file.name, file.sha256) for file in files)
