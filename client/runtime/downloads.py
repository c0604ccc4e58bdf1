"""The base that a federation trains, by its content hash: from a folder, the hub or the federation's own server.

It is found again by that hash (`base=<hash>`, `models.base.assets.locate`). Nothing that was half fetched is lost, and
nothing is taken that hasn't the hash. A network that is paid by volume and a disk that is nearly full are left alone,
unless the owner says otherwise (`conf.schemas.node.FetchConfig`).
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
from models.base import assets, chunk_manifest, hub

GetBytes = Callable[[str, int, int | None], Iterator[bytes]]
"""Bytes of a path of the server, from an offset and so many, or all of them.

Raises ConnectionError for what may be tried again, AntherError for what may not (`client.runtime.http_source`).
"""
Progress = Callable[[int, int], None]
"""Told bytes that are here and bytes in all."""

WAITS = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)  # seconds before each time that a cut link is tried again
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
    """The folder of the base of this content hash, fetched unless it is here.

    Args:
        get: of the federation's server; None: it isn't asked.
        metered: whether the network is paid by volume now; asked before anything is fetched over it.

    Raises:
        AntherError: it can't be had, or may not be: says why of each source. Done again, it goes on where it was.
    """
    if not assets.is_hash(wanted):
        raise AntherError(f"base {wanted[:80]!r}: not a content hash of 64 hex digits")
    if there := assets.find_stored(wanted):
        return there
    folder = assets.home() / "assets"
    atomic_files.make_folder(folder)
    with file_lock.exclusive(
        resumable_download.partial_dir(folder, wanted), what=f"base {wanted[:12]}, being fetched,"
    ):
        if there := assets.find_stored(wanted):  # from whoever held the lock until now
            return there
        fetcher = _Fetcher(wanted, settings, folder, metered, progress)
        sources: dict[str, Callable[[], Path] | None] = {
            "folder": fetcher.from_folder if settings.folder else None,
            "hub": fetcher.from_hub if settings.hub else None,
            "server": (lambda: fetcher.from_server(get, waits, sleep)) if get else None,
        }
        return _first(wanted, settings.source, sources)


def _first(wanted: str, source: str, sources: dict[str, Callable[[], Path] | None]) -> Path:
    """From the first source that has it, of those that may be asked."""
    reasons = []
    for name, take in sources.items():
        if source not in ("auto", name):
            continue
        try:
            if take:
                return take()
            reasons.append(f"{name}: none is named")
        except AntherError as error:
            reasons.append(f"{name}: {error}")
    raise AntherError(f"base {wanted[:12]} is not here and can't be had: {'; '.join(reasons)}")


class _Fetcher:
    """The ways to one base."""

    def __init__(
        self, wanted: str, settings: FetchConfig, folder: Path, metered: Callable[[], bool], progress: Progress
    ) -> None:
        self._wanted, self._settings, self._folder = wanted, settings, folder
        self._metered, self._progress = metered, progress

    def from_folder(self) -> Path:
        """Linked if it is on the same disk, which need not hold it twice; else copied, as a stick is pulled out."""
        return self._adopted(Path(str(self._settings.folder)).expanduser(), "fetch.folder")

    def from_hub(self) -> Path:
        """Fetched into the hub's own cache."""
        self._check_network()
        self._check_disk(0)
        return self._adopted(hub.fetch(str(self._settings.hub)), f"fetch.hub={self._settings.hub}")

    def from_server(self, get: GetBytes, waits: Sequence[float], sleep: Callable[[float], None]) -> Path:
        """In chunks; a link that is cut is tried again."""
        steady = _Steady(get, self._check_network, waits, sleep)
        base = f"{PATH}/{self._wanted}"
        manifest = chunk_manifest.decode_manifest(
            steady(f"{base}/manifest", 0, None, chunk_manifest.MAX_MANIFEST_BYTES), self._wanted
        )
        return self._filled(
            manifest,
            lambda number, offset, length: [steady(f"{base}/file/{number}", offset, length, length)],
            "the server",
        )

    def _adopted(self, found: Path, said: str) -> Path:
        if not found.is_dir():
            raise AntherError(f"{said}: {found} is not there")
        try:
            digest = assets.digest(found)
        except OSError as error:
            raise AntherError(f"{said}: {found} can't be read ({error})") from error
        if digest != self._wanted:
            raise AntherError(f"{said}: {found} holds another base, {digest[:12]}")
        if found.stat().st_dev == self._folder.stat().st_dev:
            filling = resumable_download.partial_dir(self._folder, self._wanted) / "asset"
            shutil.rmtree(filling, ignore_errors=True)
            filling.mkdir()
            (filling / chunk_manifest.safe_name(found)).symlink_to(found.absolute(), target_is_directory=True)
            return resumable_download.place(filling, self._folder / self._wanted)
        manifest = chunk_manifest.build(found)

        def read(number: int, offset: int, length: int) -> Iterator[bytes]:
            try:
                with (found / manifest.files[number].name).open("rb") as content:
                    content.seek(offset)
                    yield content.read(length)
            except OSError as error:
                raise AntherError(f"{said}: {found} can't be read any more ({error})") from error

        return self._filled(manifest, read, str(found))

    def _filled(self, manifest: chunk_manifest.ChunkManifest, read: resumable_download.Read, source: str) -> Path:
        coming = resumable_download.ResumableDownload(self._folder, manifest)
        self._check_disk(manifest.total - coming.kept)
        return coming.fill(read, source, lambda done: self._progress(done, manifest.total))

    def _check_network(self) -> None:
        if not self._settings.allow_metered and self._metered():
            raise AntherError("the network is paid by volume: wait for another, or set fetch.allow_metered=true")

    def _check_disk(self, needed: int) -> None:
        free, stays = shutil.disk_usage(self._folder).free, self._settings.min_free_gib
        if free - needed < stays * 2**30:
            raise AntherError(
                f"{self._folder}: {needed / 2**30:.2f} GiB are to come and {free / 2**30:.2f} are free, of which "
                f"fetch.min_free_gib={stays:g} stay free: make room"
            )


class _Steady:
    """A server's bytes over a link that may be cut: asked for again after waiting, each time a little longer."""

    def __init__(
        self, get: GetBytes, check: Callable[[], None], waits: Sequence[float], sleep: Callable[[float], None]
    ) -> None:
        self._get, self._check, self._waits, self._sleep = get, check, waits, sleep

    def __call__(self, path: str, offset: int, length: int | None, most: int) -> bytes:
        """All of them; a byte more than `most` at the most, which whoever asked will find too much."""
        for wait in (*self._waits, None):
            self._check()
            data = bytearray()
            try:
                for piece in self._get(path, offset, length):
                    data += piece
                    if len(data) > most:
                        break
                return bytes(data[: most + 1])
            except (ConnectionError, TimeoutError) as error:
                if wait is None:
                    raise AntherError(
                        f"the link was cut {len(self._waits) + 1} times ({error}): what came is kept, start again later"
                    ) from error
                self._sleep(wait)
        raise AssertionError
