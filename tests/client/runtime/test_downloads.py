"""Fetching a base by its hash from all sources: complete or not at all, and no part is fetched twice."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from client.runtime.downloads import fetch
from client.runtime.http_source import http_get
from common.errors import AntherError
from conf.schemas.node import FetchConfig
from models.files import assets, chunk_manifest, hub
from server.gateway.base_files import BaseFiles, routes
from tests.helpers.kills import durable_calls, killed_before

FREE = FetchConfig(min_free_gib=0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(chunk_manifest, "CHUNK", 64)
    return tmp_path / "home"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Create a folder that looks like a base: 11 chunks in 4 files."""
    folder = tmp_path / "operator" / "tiny-base"
    for name, size in {"model_index.json": 10, "unet/x.safetensors": 500, "unet/config.json": 128, "e.txt": 0}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(hashlib.shake_256(name.encode()).digest(size))
    (folder / "README.md").write_text("a card, which isn't carried")
    return folder


class BaseServer:
    """Answers like `server.gateway.base_files`, and records requests; `tamper` maps chunks to the replies sent in their
    place.
    """

    def __init__(self, *folders: Path) -> None:
        self._shelf = BaseFiles(folders)
        self.requested: list[tuple[str, int]] = []
        self.sent = 0
        self.tamper: dict[tuple[str, int], list[bytes | Exception]] = {}

    def __call__(self, path: str, offset: int, length: int | None) -> Iterator[bytes]:
        base, *_, what = path.removeprefix("/v1/anther/base/").split("/")
        if what == "manifest":
            data = self._shelf.manifest(base) or b""
        else:
            file = self._shelf.file(base, what)
            assert file is not None
            assert length is not None
            self.requested.append((what, offset))
            data = file.read_bytes()[offset : offset + length]
            if instead := self.tamper.get((what, offset)):
                changed = instead.pop(0)
                if isinstance(changed, Exception):
                    yield data[:5]
                    raise changed
                data = changed
            self.sent += len(data)
        yield data[:7]
        yield data[7:]


def unhurried(_: float) -> None:
    pass


def test_fetch_from_real_app_over_http(base: Path, home: Path) -> None:
    expected, response = assets.digest(base), []
    with httpx.Client(transport=Asgi(Starlette(routes=routes(BaseFiles([base])))), base_url="https://s") as client:
        folder = fetch(expected, FREE, http_get(client), progress=lambda done, total: response.append((done, total)))
        with pytest.raises(AntherError, match="doesn't have this base"):
            fetch("0" * 64, FREE, http_get(client))
    assert folder == home / "assets" / expected / "tiny-base" == assets.locate(expected)
    assert assets.digest(folder) == expected
    assert response[-1] == (638, 638)
    assert response == sorted(response)
    assert [path.name for path in (home / "assets").iterdir() if not path.name.startswith(".fetching-000")] == [
        expected
    ]
    assert fetch(expected, FREE) == folder  # no further request


class Asgi(httpx.BaseTransport):
    """Transport that calls an app without a network."""

    def __init__(self, app: Starlette) -> None:
        self._app = httpx.ASGITransport(app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def answered() -> httpx.Response:
            requested = httpx.Request(request.method, request.url, headers=request.headers)
            reply = await self._app.handle_async_request(requested)
            body = await reply.aread()
            return httpx.Response(reply.status_code, headers=reply.headers, stream=httpx.ByteStream(body))

        return asyncio.run(answered())


@pytest.mark.integration
def test_fetch_continues_after_kill_at_every_step(
    base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_manifest, "CHUNK", 250)
    expected, server = assets.digest(base), BaseServer(base)
    calls = durable_calls(lambda: work(expected, server), tmp_path / "trace")
    assert {"pwrite", "rename", "mkdir", "fsync"} <= set(calls)
    fetched = []
    for call in range(len(calls)):
        shutil.rmtree(home, ignore_errors=True)
        killed_before(call, lambda: work(expected, server))
        existing = (home / "assets" / expected).exists()
        assert not existing or assets.digest(home / "assets" / expected / "tiny-base") == expected
        repeated = BaseServer(base)
        folder = fetch(expected, FREE, repeated)
        assert assets.digest(folder) == expected
        fetched.append(repeated.sent)
    assert fetched[0] == 638
    assert fetched == sorted(fetched, reverse=True)  # the later the kill, the fewer bytes are fetched again
    assert fetched[-1] == 0


def work(base_hash: str, server: BaseServer) -> None:
    fetch(base_hash, FREE, server)


def test_broken_connection_is_retried(base: Path) -> None:
    expected, server, waited = assets.digest(base), BaseServer(base), []
    big = chunk_manifest.build(base).files.index(
        next(file for file in chunk_manifest.build(base).files if file.size == 500)
    )
    server.tamper[str(big), 128] = [ConnectionError("cut"), TimeoutError("slow")]
    fetch(expected, FREE, server, waits=(1, 2), sleep=waited.append)
    assert waited == [1, 2]
    assert server.requested.count((str(big), 128)) == 3
    assert len(server.requested) == 11 + 2


def test_persistent_failure_can_be_continued_later(base: Path) -> None:
    expected, server = assets.digest(base), BaseServer(base)
    big = chunk_manifest.build(base).files.index(
        next(file for file in chunk_manifest.build(base).files if file.size == 500)
    )
    server.tamper[str(big), 256] = [ConnectionError("cut")] * 3
    with pytest.raises(AntherError, match="failed 3 times"):
        fetch(expected, FREE, server, waits=(1, 2), sleep=unhurried)
    repeated = BaseServer(base)
    fetch(expected, FREE, repeated)
    assert (repeated.sent, repeated.requested[0]) == (638 - server.sent, (str(big), 256))


@pytest.mark.parametrize("wrong", [b"", b"x" * 64, b"short", b"y" * 10_000])
def test_wrong_chunk_is_fetched_once_more(wrong: bytes, base: Path, home: Path) -> None:
    expected, server = assets.digest(base), BaseServer(base)
    big = chunk_manifest.build(base).files.index(
        next(file for file in chunk_manifest.build(base).files if file.size == 500)
    )
    server.tamper[str(big), 64] = [wrong, wrong]
    with pytest.raises(AntherError, match=r"unet/x\.safetensors: chunk 2 of 8 from the server was wrong twice"):
        fetch(expected, FREE, server)
    assert not (home / "assets" / expected).exists()
    server.tamper[str(big), 64] = [wrong]
    assert assets.digest(fetch(expected, FREE, server)) == expected


def test_partial_files_are_verified(base: Path, home: Path) -> None:
    """After a power failure, chunks may be zeros, or there may be extra bytes."""
    expected, server = assets.digest(base), BaseServer(base)
    big = chunk_manifest.build(base).files.index(
        next(file for file in chunk_manifest.build(base).files if file.size == 500)
    )
    server.tamper[str(big), 448] = [b"", b""]
    with pytest.raises(AntherError):
        fetch(expected, FREE, server)
    (half,) = home.glob("assets/.fetching-*/asset/*/unet/x.safetensors")
    half.write_bytes(half.read_bytes()[:200] + bytes(500))
    repeated = BaseServer(base)
    assert assets.digest(fetch(expected, FREE, repeated)) == expected
    assert repeated.requested[0] == (str(big), 192)


def test_wrong_file_with_matching_chunks_is_refused(base: Path, tmp_path: Path, home: Path) -> None:
    """A sender that lies about chunk hashes is detected by the file's hash, which the base's hash covers."""
    expected = assets.digest(base)
    honest = chunk_manifest.build(base)
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    (changed / "unet" / "x.safetensors").write_bytes(b"z" * 500)
    lies = chunk_manifest.build(changed)
    files = tuple(
        chunk_manifest.ManifestFile(a.name, a.size, a.sha256, b.chunks)
        for a, b in zip(honest.files, lies.files, strict=True)
    )
    manifest = chunk_manifest.ChunkManifest(expected, "tiny-base", files)

    def get(path: str, offset: int, length: int | None) -> Iterator[bytes]:
        if length is None:
            return iter([manifest.encode()])
        name = files[int(path.rsplit("/", 1)[1])].name
        return iter([(changed / name).read_bytes()[offset : offset + length]])

    with pytest.raises(AntherError, match=r"unet/x\.safetensors: .* sent a file that doesn't belong to base"):
        fetch(expected, FREE, get)
    assert not (home / "assets" / expected).exists()
    assert assets.digest(fetch(expected, FREE, BaseServer(base))) == expected


def test_manifest_with_outside_path_is_refused(home: Path) -> None:
    file = b'{"name": "../../x.json", "size": 0, "sha256": "%s", "chunks": []}' % (b"0" * 64)
    manifest = b'{"format": 1, "base": "%s", "name": "b", "files": [%s]}' % (b"1" * 64, file)
    with pytest.raises(AntherError, match="unsafe name"):
        fetch("1" * 64, FREE, lambda *_: iter([manifest]))
    assert [path for path in home.rglob("*") if path.is_file() and path.name != "lock"] == []


def test_endless_manifest_is_refused() -> None:
    def endless(*_: object) -> Iterator[bytes]:
        while True:
            yield b" " * (1 << 20)

    with pytest.raises(AntherError, match="longer than 8 MiB"):
        fetch("1" * 64, FREE, endless)


def test_metered_network_is_not_used(base: Path) -> None:
    expected, server = assets.digest(base), BaseServer(base)
    with pytest.raises(AntherError, match=r"metered.*fetch\.allow_metered=true"):
        fetch(expected, FREE, server, metered=lambda: True)
    assert server.requested == []
    answers = iter([False] * 6 + [True] * 100)
    with pytest.raises(AntherError, match="network is metered"):  # the network may become metered during the download
        fetch(expected, FREE, server, metered=lambda: next(answers))
    assert len(server.requested) == 5
    assert fetch(expected, FetchConfig(min_free_gib=0, allow_metered=True), server, metered=lambda: True)


def test_nearly_full_disk_is_not_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, server = assets.digest(base), BaseServer(base)
    real, free = os.statvfs, 2**30 + 600
    monkeypatch.setattr(
        os, "statvfs", lambda path: os.statvfs_result((1, 1, 2**40, free, free, *tuple(real(path))[5:10]))
    )
    with pytest.raises(
        AntherError, match=r"0\.00 GiB are needed, 1\.00 GiB are free.*fetch\.min_free_gib=1 GiB must stay free"
    ):
        fetch(expected, FetchConfig(), server)
    assert server.requested == []
    assert fetch(expected, FetchConfig(min_free_gib=0.9), server)


def test_disk_that_fills_up(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, server, real, room = assets.digest(base), BaseServer(base), os.pwrite, 300

    def filling(handle: int, data: memoryview, offset: int) -> int:
        nonlocal room
        if (written := min(len(data), room)) == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room -= written
        return real(handle, data[:written], offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", filling)
        with pytest.raises(AntherError, match="the disk is full; the downloaded part is kept: free"):
            fetch(expected, FREE, server)
    repeated = BaseServer(base)
    assert assets.digest(fetch(expected, FREE, repeated)) == expected
    assert repeated.sent < 450


def test_two_concurrent_downloads(base: Path) -> None:
    expected, server = assets.digest(base), BaseServer(base)
    refusals = []

    def second(_done: int, _total: int) -> None:
        if not refusals:
            with pytest.raises(AntherError, match=f"in use by process {os.getpid()}") as raised:
                fetch(expected, FREE, server)
            refusals.append(raised)

    fetch(expected, FREE, server, progress=second)
    assert refusals


def test_folder_on_same_disk_is_linked(base: Path, home: Path) -> None:
    expected = assets.digest(base)
    folder = fetch(expected, FetchConfig(folder=str(base)))
    assert folder == home / "assets" / expected / "tiny-base" == assets.locate(expected)
    assert folder.is_symlink()
    shutil.rmtree(base)  # the link is broken: the base is fetched again
    with pytest.raises(AntherError, match="doesn't exist"):
        fetch(expected, FetchConfig(folder=str(base)))


def test_folder_on_other_disk_is_copied(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, real = assets.digest(base), Path.stat

    def elsewhere(path: Path, **options: bool) -> os.stat_result:
        folder = real(path, **options)
        return os.stat_result((*folder[:2], folder.st_dev + (path == base), *folder[3:10]))

    monkeypatch.setattr(Path, "stat", elsewhere)
    folder = fetch(expected, FetchConfig(folder=str(base), min_free_gib=0))
    shutil.rmtree(base)
    assert not folder.is_symlink()
    assert assets.digest(folder) == expected


def test_order_of_sources_and_error(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, other = assets.digest(base), tmp_path / "other"
    shutil.copytree(base, other)
    (other / "model_index.json").write_text("{}")
    requested = []

    def from_hub(name: str) -> Path:
        requested.append(name)
        return other

    monkeypatch.setattr(hub, "fetch", from_hub)
    settings = FetchConfig(folder=str(tmp_path / "none"), hub="maker/base", min_free_gib=0)
    with pytest.raises(AntherError, match=r"folder: .* doesn't exist; hub: .* contains another base.*; server: not"):
        fetch(expected, settings)
    assert requested == ["maker/base"]
    with pytest.raises(AntherError, match=r"fetched: folder: fetch\.folder: .* doesn't exist$"):
        fetch(expected, FetchConfig(source="folder", folder=str(tmp_path / "none")), BaseServer(base))
    assert assets.digest(fetch(expected, settings, BaseServer(base))) == expected
    with pytest.raises(AntherError, match="not a content hash"):
        fetch("../x", settings)


def test_responses_of_other_servers() -> None:
    def answering(status: int) -> AntherError | ConnectionError:
        client = httpx.Client(
            transport=httpx.MockTransport(lambda _: httpx.Response(status, content=b"x" * 10)), base_url="https://pi:1"
        )
        with pytest.raises((AntherError, ConnectionError)) as raised:
            list(http_get(client)("/x", 0, 5))
        return raised.value

    for status, output in {
        401: "ask its operator",
        404: "doesn't have this base",
        200: "answers 200",
        302: "answers 302",
    }.items():
        result = answering(status)
        assert isinstance(result, AntherError)
        assert output in str(result)
        assert "pi:1" in str(result)
    for status in (429, 500, 503):
        assert isinstance(answering(status), ConnectionError)


def test_dropped_connection_is_retried() -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        link, _ = listening.accept()
        link.recv(65536)
        head = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 64\r\nContent-Range: bytes 0-63/64\r\n\r\n"
        link.sendall(head + b"only this")
        link.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", trust_env=False) as client:
        with pytest.raises(ConnectionError):
            list(http_get(client)("/x", 0, 64))
        thread.join()
        listening.close()
        with pytest.raises(ConnectionError):
            list(http_get(client)("/x", 0, 64))
