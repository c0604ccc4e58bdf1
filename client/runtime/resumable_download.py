"""A base on its way here: kept chunk by chunk, each checked before it is kept, and gone on with after any break.

It lies in `assets/.fetching-<hash>/` as it will lie in the end, and appears as `assets/<hash>/<name>` in one step, when
it is whole and what is on the disk has the hash that was wanted.
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
from models.base import chunk_manifest
from models.base.chunk_manifest import ChunkManifest, ManifestFile

Read = Callable[[int, int, int], Iterable[bytes]]
"""Bytes of the n-th file from an offset, so many; AntherError if they can't be had."""


class ResumableDownload:
    """What has come of one base so far.

    Args:
        assets: the folder that all of them lie in.
        manifest: of the base, checked.
    """

    def __init__(self, assets: Path, manifest: ChunkManifest) -> None:
        self._assets, self._manifest = assets, manifest
        self._filling = partial_dir(assets, manifest.base) / "asset"
        self._folder = self._filling / manifest.name

    @property
    def kept(self) -> int:
        """Bytes that lie here; what of them is not whole or not right will be asked for again."""
        return sum(min(part.size, _size(self._folder / part.name)) for part in self._manifest.files)

    def fill(self, read: Read, source: str, progress: Callable[[int], None]) -> Path:
        """Fetch what is missing; the base, in its place.

        Args:
            source: for messages.
            progress: told the bytes that are here and right, after every chunk.

        Raises:
            AntherError: a chunk was wrong twice, a file isn't what its hash says, or the disk is full. Done again, it
                goes on where it was.
        """
        done = 0
        for number, part in enumerate(self._manifest.files):
            try:
                done = self._fill_file(number, part, read, source, done, progress)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise AntherError(f"{self._folder / part.name}: can't be written ({error}): mend that") from error
                raise AntherError(
                    f"{self._folder / part.name}: the disk is full; what came so far is kept: free "
                    f"{(self._manifest.total - done) / 1e6:.0f} MB and start again"
                ) from error
        return self._arrive()

    def _fill_file(
        self, number: int, part: ManifestFile, read: Read, source: str, done: int, progress: Callable[[int], None]
    ) -> int:
        path = self._folder / part.name
        atomic_files.make_folder(path.parent)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        whole = hashlib.sha256()
        try:
            for index in range(first := _right(handle, part, whole), len(part.chunks)):
                if index == first:
                    os.ftruncate(handle, part.span(first)[0])
                data = _fetched(read, number, part, index, source)
                _append(handle, data, part.span(index)[0])
                whole.update(data)
                progress(done + sum(part.span(index)))
            os.ftruncate(handle, part.size)
            os.fsync(handle)
        finally:
            os.close(handle)
        if whole.hexdigest() != part.sha256:
            path.unlink()
            raise AntherError(f"{part.name}: not the file of base {self._manifest.base[:12]}, as it came from {source}")
        progress(done + part.size)
        return done + part.size

    def _arrive(self) -> Path:
        """Put it in its place, if it is what was wanted as it lies on the disk."""
        if not chunk_manifest.verify(self._folder, self._manifest.base):
            shutil.rmtree(self._filling, ignore_errors=True)
            raise AntherError(
                f"{self._folder}: what the disk holds is not what was written, and was removed: look after the disk, "
                "and start again"
            )
        for folder in {(self._folder / part.name).parent for part in self._manifest.files} | {self._folder}:
            atomic_files.sync_folder(folder)
        return place(self._filling, self._assets / self._manifest.base)


def partial_dir(assets: Path, base: str) -> Path:
    """Where a base lies while it is not whole."""
    return assets / f".fetching-{base}"


def place(filling: Path, final: Path) -> Path:
    """Give a filled folder its final name in one step; what it holds. Whatever lies there was no asset."""
    atomic_files.sync_folder(filling)
    shutil.rmtree(final, ignore_errors=True)
    filling.rename(final)
    atomic_files.sync_folder(final.parent)
    shutil.rmtree(filling.parent, ignore_errors=True)
    return next(iter(sorted(final.iterdir())))


def _right(handle: int, part: ManifestFile, whole: hashlib._Hash) -> int:
    """How many chunks from the first on are here and right: a power cut may have left others."""
    for index in range(len(part.chunks)):
        offset, length = part.span(index)
        data = os.pread(handle, length, offset)
        if not part.verify(index, data):
            return index
        whole.update(data)
    return len(part.chunks)


def _fetched(read: Read, number: int, part: ManifestFile, index: int, source: str) -> bytes:
    """One chunk, as its hash says; asked for once more if it isn't."""
    offset, length = part.span(index)
    for _ in range(2):
        data = bytearray()
        for piece in read(number, offset, length):
            data += piece
            if len(data) > length:
                break  # whoever sends more than was asked for isn't listened to
        if part.verify(index, bytes(data)):
            return bytes(data)
    raise AntherError(
        f"{part.name}: chunk {index + 1} of {len(part.chunks)} from {source} was wrong twice: its operator has to look "
        "after the base, which may have changed since it was started"
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
