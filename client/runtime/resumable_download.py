"""A resumable download of a base: chunks are verified before they are stored, and a later call continues.

Files are written to `assets/.fetching-<hash>/` in their final layout. The folder becomes `assets/<hash>/<name>` in one
step, when it is complete and its content on disk has the wanted hash.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from common import atomic_files
from common.errors import AntherError
from models.files import chunk_manifest
from models.files.chunk_manifest import ChunkManifest, ManifestFile

ReadRange = Callable[[int, int, int], Iterable[bytes]]
"""Function that reads bytes of the n-th file: (n, offset, length); AntherError if they are unavailable."""


class ResumableDownload:
    """The downloaded part of one base.

    Args:
        assets: folder of all bases.
        manifest: the base's verified manifest.
    """

    def __init__(self, assets: Path, manifest: ChunkManifest) -> None:
        self._assets, self._manifest = assets, manifest
        self._filling = partial_dir(assets, manifest.base) / "asset"
        self._folder = self._filling / manifest.name

    @property
    def stored_bytes(self) -> int:
        """Bytes stored so far; incomplete or wrong chunks among them will be fetched again."""
        return sum(min(part.size, _size(self._folder / part.name)) for part in self._manifest.files)

    def complete(self, read: ReadRange, source: str, progress: Callable[[int], None]) -> Path:
        """Fetch the missing chunks; return the base's final folder.

        Args:
            read: reads bytes from the source.
            source: name of the source, for messages.
            progress: called with the number of verified bytes after every chunk.

        Raises:
            AntherError: a chunk was wrong twice, a file doesn't match its hash, or the disk is full. A later call
                continues.
        """
        done = 0
        for number, part in enumerate(self._manifest.files):
            try:
                done = self._complete_file(number, part, read, source, done, progress)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise AntherError(
                        f"{self._folder / part.name}: can't be written ({error}): check the disk"
                    ) from error
                raise AntherError(
                    f"{self._folder / part.name}: the disk is full; the downloaded part is kept: free "
                    f"{(self._manifest.total - done) / 1e6:.0f} MB and start again"
                ) from error
        return self._publish()

    def _complete_file(
        self, number: int, part: ManifestFile, read: ReadRange, source: str, done: int, progress: Callable[[int], None]
    ) -> int:
        path = self._folder / part.name
        atomic_files.make_folder(path.parent)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        digest = hashlib.sha256()
        try:
            for index in range(first := _verified_chunks(handle, part, digest), len(part.chunks)):
                if index == first:
                    os.ftruncate(handle, part.span(first)[0])
                data = _fetch_chunk(read, number, part, index, source)
                _append(handle, data, part.span(index)[0])
                digest.update(data)
                progress(done + sum(part.span(index)))
            os.ftruncate(handle, part.size)
            os.fsync(handle)
        finally:
            os.close(handle)
        if digest.hexdigest() != part.sha256:
            path.unlink()
            raise AntherError(
                f"{part.name}: {source} sent a file that doesn't belong to base {self._manifest.base[:12]}"
            )
        progress(done + part.size)
        return done + part.size

    def _publish(self) -> Path:
        """Move the base to its final folder after verifying its content on disk."""
        if not chunk_manifest.verify(self._folder, self._manifest.base):
            shutil.rmtree(self._filling, ignore_errors=True)
            raise AntherError(
                f"{self._folder}: the disk returned other data than was written; it was removed: check the disk, "
                "and start again"
            )
        for folder in {(self._folder / part.name).parent for part in self._manifest.files} | {self._folder}:
            atomic_files.sync_folder(folder)
        return publish(self._filling, self._assets / self._manifest.base)


def partial_dir(assets: Path, base: str) -> Path:
    """Return the folder of an incomplete base."""
    return assets / f".fetching-{base}"


def publish(folder: Path, final: Path) -> Path:
    """Rename a complete folder to its final name in one step; return the asset in it.

    An existing folder of that name is removed: it isn't a valid asset.
    """
    atomic_files.sync_folder(folder)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    atomic_files.sync_folder(final.parent)
    shutil.rmtree(folder.parent, ignore_errors=True)
    return next(iter(sorted(final.iterdir())))


def _verified_chunks(handle: int, part: ManifestFile, digest: hashlib._Hash) -> int:
    """Count the verified chunks from the start of the file; after a power failure, later chunks may be missing."""
    for index in range(len(part.chunks)):
        offset, length = part.span(index)
        data = os.pread(handle, length, offset)
        if not part.verify(index, data):
            return index
        digest.update(data)
    return len(part.chunks)


def _fetch_chunk(read: ReadRange, number: int, part: ManifestFile, index: int, source: str) -> bytes:
    """Fetch one chunk and verify its hash; retry once."""
    offset, length = part.span(index)
    for _ in range(2):
        data = bytearray()
        for piece in read(number, offset, length):
            data += piece
            if len(data) > length:
                break  # stop reading a response that is longer than requested
        if part.verify(index, bytes(data)):
            return bytes(data)
    raise AntherError(
        f"{part.name}: chunk {index + 1} of {len(part.chunks)} from {source} was wrong twice: its operator has to "
        "check the base, which may have changed since the server was started"
    )


def _append(handle: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
    os.fsync(handle)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
