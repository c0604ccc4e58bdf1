"""Fetch the base that a federation trains, by its content hash: from a folder, the hub or the federation's server.

The base is then located by that hash (`base=<hash>`, `models.files.assets.locate`). Partial downloads are kept, and
only content with the right hash is accepted. Nothing is fetched over a metered network or onto a nearly full disk,
unless the owner allows it (`conf.schemas.node.FetchConfig`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from client.runtime import resumable_download
from common import atomic_files, file_lock
from common.errors import AntherError
from conf.schemas.node import FetchConfig
from models.files import assets, chunk_manifest, hub

GetBytes = Callable[[str, int, int | None], Iterator[bytes]]
"""Function that reads bytes of a path on the server: (path, offset, length); length None: all.

Raises ConnectionError if a retry may help, AntherError if not (`client.runtime.http_source`).
"""
Progress = Callable[[int, int], None]
"""Called with the bytes downloaded so far and the total bytes."""

WAITS = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)  # seconds before each retry of a broken connection
PATH = "/v1/anther/base"  # of `server.gateway.base_files`


def fetch(
    wanted: str,
    settings: FetchConfig,
    get: GetBytes | None = None,
    *,
    metered: Callable[[], bool] = lambda: False,
    progress: Progress = lambda _done, _total: None,
    waits: Sequence[float] = WAITS,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Return the folder of the base of this content hash; download it if it is missing.

    Args:
        wanted: content hash of the base.
        settings: the owner's limits and sources.
        get: reads from the federation's server; None: the server isn't a source.
        metered: whether the network is paid by volume now; called before each request.
        progress: called after each chunk.
        waits: seconds before each retry.
        sleep: waits for this many seconds.

    Raises:
        AntherError: the base can't be fetched; the message has the reason for each source. A later call continues the
            download.
    """
    if not assets.is_hash(wanted):
        raise AntherError(f"base {wanted[:80]!r}: not a content hash of 64 hex digits")
    if stored := assets.find_stored(wanted):
        return stored
    folder = assets.home() / "assets"
    atomic_files.make_folder(folder)
    with file_lock.exclusive(
        resumable_download.partial_dir(folder, wanted), what=f"base {wanted[:12]}, being fetched,"
    ):
        if stored := assets.find_stored(wanted):  # fetched by another process while we waited for the lock
            return stored
        fetcher = _Fetcher(wanted, settings, folder, metered, progress)
        sources: dict[str, Callable[[], Path] | None] = {
            "folder": fetcher.from_folder if settings.folder else None,
            "hub": fetcher.from_hub if settings.hub else None,
            "server": (lambda: fetcher.from_server(get, waits, sleep)) if get else None,
        }
        return _from_first_source(wanted, settings.source, sources)


def _from_first_source(wanted: str, source: str, sources: dict[str, Callable[[], Path] | None]) -> Path:
    """Fetch from the first of the allowed sources that has the base."""
    reasons = []
    for name, read in sources.items():
        if source not in ("auto", name):
            continue
        try:
            if read:
                return read()
            reasons.append(f"{name}: not configured")
        except AntherError as error:
            reasons.append(f"{name}: {error}")
    raise AntherError(f"base {wanted[:12]} is missing and can't be fetched: {'; '.join(reasons)}")


class _Fetcher:
    """Fetcher of one base, with a method for each kind of source."""

    def __init__(
        self, wanted: str, settings: FetchConfig, folder: Path, metered: Callable[[], bool], progress: Progress
    ) -> None:
        self._wanted, self._settings, self._folder = wanted, settings, folder
        self._metered, self._progress = metered, progress

    def from_folder(self) -> Path:
        """Link the folder if it is on the same disk, which saves space; else copy it.

        A folder on another disk may be on a removable drive.
        """
        return self._from_local(Path(str(self._settings.folder)).expanduser(), "fetch.folder")

    def from_hub(self) -> Path:
        """Fetch into the hub's own cache."""
        self._check_network()
        self._check_disk(0)
        return self._from_local(hub.fetch(str(self._settings.hub)), f"fetch.hub={self._settings.hub}")

    def from_server(self, get: GetBytes, waits: Sequence[float], sleep: Callable[[float], None]) -> Path:
        """Fetch in chunks, with retries."""
        reader = _RetryingReader(get, self._check_network, waits, sleep)
        base = f"{PATH}/{self._wanted}"
        manifest = chunk_manifest.decode_manifest(
            reader(f"{base}/manifest", 0, None, chunk_manifest.MAX_MANIFEST_BYTES), self._wanted
        )
        return self._download(
            manifest,
            lambda number, offset, length: [reader(f"{base}/file/{number}", offset, length, length)],
            "the server",
        )

    def _from_local(self, folder: Path, setting: str) -> Path:
        if not folder.is_dir():
            raise AntherError(f"{setting}: {folder} doesn't exist")
        try:
            digest = assets.digest(folder)
        except OSError as error:
            raise AntherError(f"{setting}: {folder} can't be read ({error})") from error
        if digest != self._wanted:
            raise AntherError(f"{setting}: {folder} contains another base, {digest[:12]}")
        if folder.stat().st_dev == self._folder.stat().st_dev:
            temporary = resumable_download.partial_dir(self._folder, self._wanted) / "asset"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            (temporary / chunk_manifest.safe_name(folder)).symlink_to(folder.absolute(), target_is_directory=True)
            return resumable_download.publish(temporary, self._folder / self._wanted)
        manifest = chunk_manifest.build(folder)

        def read(number: int, offset: int, length: int) -> Iterator[bytes]:
            try:
                with (folder / manifest.files[number].name).open("rb") as content:
                    content.seek(offset)
                    yield content.read(length)
            except OSError as error:
                raise AntherError(f"{setting}: {folder} can no longer be read ({error})") from error

        return self._download(manifest, read, str(folder))

    def _download(
        self, manifest: chunk_manifest.ChunkManifest, read: resumable_download.ReadRange, source: str
    ) -> Path:
        download = resumable_download.ResumableDownload(self._folder, manifest)
        self._check_disk(manifest.total - download.stored_bytes)
        return download.complete(read, source, lambda done: self._progress(done, manifest.total))

    def _check_network(self) -> None:
        if not self._settings.allow_metered and self._metered():
            raise AntherError("the network is metered: connect to another, or set fetch.allow_metered=true")

    def _check_disk(self, needed: int) -> None:
        free, reserved = shutil.disk_usage(self._folder).free, self._settings.min_free_gib
        if free - needed < reserved * 2**30:
            raise AntherError(
                f"{self._folder}: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free, and "
                f"fetch.min_free_gib={reserved:g} GiB must stay free: delete files"
            )


class _RetryingReader:
    """Reader of a server over an unreliable connection, which retries after increasing pauses."""

    def __init__(
        self, get: GetBytes, check: Callable[[], None], waits: Sequence[float], sleep: Callable[[float], None]
    ) -> None:
        self._get, self._check, self._waits, self._sleep = get, check, waits, sleep

    def __call__(self, path: str, offset: int, length: int | None, max_bytes: int) -> bytes:
        """Return all bytes, at most `max_bytes` + 1, so that the caller detects a response that is too long.

        Args:
            path: path on the server.
            offset: first byte.
            length: number of bytes; None: all.
            max_bytes: maximum number of bytes.
        """
        for wait in (*self._waits, None):
            self._check()
            data = bytearray()
            try:
                for piece in self._get(path, offset, length):
                    data += piece
                    if len(data) > max_bytes:
                        break
                return bytes(data[: max_bytes + 1])
            except (ConnectionError, TimeoutError) as error:
                if wait is None:
                    raise AntherError(
                        f"the connection failed {len(self._waits) + 1} times ({error}): the downloaded part is "
                        "kept, try again later"
                    ) from error
                self._sleep(wait)
        raise AssertionError
