"""A base comes by its hash from wherever it may, whole or not at all, and what came of it is never fetched again."""

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
from tests.helpers.kills import counted, killed_before

FREE = FetchConfig(min_free_gib=0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(chunk_manifest, "CHUNK", 64)
    return tmp_path / "home"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that looks like a base: 11 chunks in 4 files."""
    folder = tmp_path / "operator" / "tiny-base"
    for name, size in {"model_index.json": 10, "unet/x.safetensors": 500, "unet/config.json": 128, "e.txt": 0}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(hashlib.shake_256(name.encode()).digest(size))
    (folder / "README.md").write_text("a card, which isn't carried")
    return folder


class Server:
    """What `server.gateway.base_files` would answer, counted; `tamper` maps asked chunks to what comes instead, in turn."""

    def __init__(self, *folders: Path) -> None:
        self._shelf = BaseFiles(folders)
        self.asked: list[tuple[str, int]] = []
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
            self.asked.append((what, offset))
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


def test_from_a_real_app_over_http(base: Path, home: Path) -> None:
    wanted, told = assets.digest(base), []
    with httpx.Client(transport=Asgi(Starlette(routes=routes(BaseFiles([base])))), base_url="https://s") as client:
        found = fetch(wanted, FREE, http_get(client), progress=lambda done, total: told.append((done, total)))
        with pytest.raises(AntherError, match="doesn't have this base"):
            fetch("0" * 64, FREE, http_get(client))
    assert found == home / "assets" / wanted / "tiny-base" == assets.locate(wanted)
    assert assets.digest(found) == wanted
    assert told[-1] == (638, 638)
    assert told == sorted(told)
    assert [path.name for path in (home / "assets").iterdir() if not path.name.startswith(".fetching-000")] == [wanted]
    assert fetch(wanted, FREE) == found  # nobody is asked any more


class Asgi(httpx.BaseTransport):
    """An app without a network, for a client that doesn't wait."""

    def __init__(self, app: Starlette) -> None:
        self._app = httpx.ASGITransport(app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def answered() -> httpx.Response:
            asked = httpx.Request(request.method, request.url, headers=request.headers)
            reply = await self._app.handle_async_request(asked)
            body = await reply.aread()
            return httpx.Response(reply.status_code, headers=reply.headers, stream=httpx.ByteStream(body))

        return asyncio.run(answered())


def test_killed_at_every_durable_step_it_goes_on(
    base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_manifest, "CHUNK", 250)
    wanted, server = assets.digest(base), Server(base)
    calls = counted(lambda: work(wanted, server), tmp_path / "trace")
    assert {"pwrite", "rename", "mkdir", "fsync"} <= set(calls)
    fetched = []
    for call in range(len(calls)):
        shutil.rmtree(home, ignore_errors=True)
        killed_before(call, lambda: work(wanted, server))
        there = (home / "assets" / wanted).exists()
        assert not there or assets.digest(home / "assets" / wanted / "tiny-base") == wanted
        again = Server(base)
        found = fetch(wanted, FREE, again)
        assert assets.digest(found) == wanted
        fetched.append(again.sent)
    assert fetched[0] == 638
    assert fetched == sorted(fetched, reverse=True)  # the later it was killed, the less came again
    assert fetched[-1] == 0


def work(wanted: str, server: Server) -> None:
    fetch(wanted, FREE, server)


def test_a_cut_link_is_tried_again_and_what_came_is_kept(base: Path) -> None:
    wanted, server, waited = assets.digest(base), Server(base), []
    big = chunk_manifest.build(base).files.index(
        next(file for file in chunk_manifest.build(base).files if file.size == 500)
    )
    server.tamper[str(big), 128] = [ConnectionError("cut"), TimeoutError("slow")]
    fetch(wanted, FREE, server, waits=(1, 2), sleep=waited.append)
    assert waited == [1, 2]
    assert server.asked.count((str(big), 128)) == 3
    assert len(server.asked) == 11 + 2


def test_a_link_that_stays_cut_is_given_up_and_gone_on_with_later(base: Path) -> None:
    wanted, server = assets.digest(base), Server(base)
    big = chunk_manifest.build(base).files.index(
        next(file for file in chunk_manifest.build(base).files if file.size == 500)
    )
    server.tamper[str(big), 256] = [ConnectionError("cut")] * 3
    with pytest.raises(AntherError, match="failed 3 times"):
        fetch(wanted, FREE, server, waits=(1, 2), sleep=unhurried)
    again = Server(base)
    fetch(wanted, FREE, again)
    assert (again.sent, again.asked[0]) == (638 - server.sent, (str(big), 256))


@pytest.mark.parametrize("wrong", [b"", b"x" * 64, b"short", b"y" * 10_000])
def test_a_wrong_chunk_is_fetched_once_more_and_then_refused(wrong: bytes, base: Path, home: Path) -> None:
    wanted, server = assets.digest(base), Server(base)
    big = chunk_manifest.build(base).files.index(
        next(file for file in chunk_manifest.build(base).files if file.size == 500)
    )
    server.tamper[str(big), 64] = [wrong, wrong]
    with pytest.raises(AntherError, match=r"unet/x\.safetensors: chunk 2 of 8 from the server was wrong twice"):
        fetch(wanted, FREE, server)
    assert not (home / "assets" / wanted).exists()
    server.tamper[str(big), 64] = [wrong]
    assert assets.digest(fetch(wanted, FREE, server)) == wanted


def test_what_lies_half_fetched_is_believed_as_far_as_it_is_right(base: Path, home: Path) -> None:
    """After a power cut there may be zeros where there were chunks, or more than there should be."""
    wanted, server = assets.digest(base), Server(base)
    big = chunk_manifest.build(base).files.index(
        next(file for file in chunk_manifest.build(base).files if file.size == 500)
    )
    server.tamper[str(big), 448] = [b"", b""]
    with pytest.raises(AntherError):
        fetch(wanted, FREE, server)
    (half,) = home.glob("assets/.fetching-*/asset/*/unet/x.safetensors")
    half.write_bytes(half.read_bytes()[:200] + bytes(500))
    again = Server(base)
    assert assets.digest(fetch(wanted, FREE, again)) == wanted
    assert again.asked[0] == (str(big), 192)


def test_chunks_that_are_as_told_and_no_file_of_the_base(base: Path, tmp_path: Path, home: Path) -> None:
    """A sender that lies about chunks is found out by the file's own hash, which the base's hash comes from."""
    wanted = assets.digest(base)
    honest = chunk_manifest.build(base)
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    (changed / "unet" / "x.safetensors").write_bytes(b"z" * 500)
    lies = chunk_manifest.build(changed)
    files = tuple(
        chunk_manifest.ManifestFile(a.name, a.size, a.sha256, b.chunks)
        for a, b in zip(honest.files, lies.files, strict=True)
    )
    manifest = chunk_manifest.ChunkManifest(wanted, "tiny-base", files)

    def get(path: str, offset: int, length: int | None) -> Iterator[bytes]:
        if length is None:
            return iter([manifest.encode()])
        name = files[int(path.rsplit("/", 1)[1])].name
        return iter([(changed / name).read_bytes()[offset : offset + length]])

    with pytest.raises(AntherError, match=r"unet/x\.safetensors: .* sent a file that doesn't belong to base"):
        fetch(wanted, FREE, get)
    assert not (home / "assets" / wanted).exists()
    assert assets.digest(fetch(wanted, FREE, Server(base))) == wanted


def test_a_manifest_that_leads_elsewhere(home: Path) -> None:
    file = b'{"name": "../../x.json", "size": 0, "sha256": "%s", "chunks": []}' % (b"0" * 64)
    manifest = b'{"format": 1, "base": "%s", "name": "b", "files": [%s]}' % (b"1" * 64, file)
    with pytest.raises(AntherError, match="unsafe name"):
        fetch("1" * 64, FREE, lambda *_: iter([manifest]))
    assert [path for path in home.rglob("*") if path.is_file() and path.name != "lock"] == []


def test_a_manifest_without_end() -> None:
    def endless(*_: object) -> Iterator[bytes]:
        while True:
            yield b" " * (1 << 20)

    with pytest.raises(AntherError, match="longer than 8 MiB"):
        fetch("1" * 64, FREE, endless)


def test_a_metered_network_is_left_alone(base: Path) -> None:
    wanted, server = assets.digest(base), Server(base)
    with pytest.raises(AntherError, match=r"metered.*fetch\.allow_metered=true"):
        fetch(wanted, FREE, server, metered=lambda: True)
    assert server.asked == []
    answers = iter([False] * 6 + [True] * 100)
    with pytest.raises(AntherError, match="network is metered"):  # it may become so on the way
        fetch(wanted, FREE, server, metered=lambda: next(answers))
    assert len(server.asked) == 5
    assert fetch(wanted, FetchConfig(min_free_gib=0, allow_metered=True), server, metered=lambda: True)


def test_a_disk_that_is_nearly_full_is_left_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, server = assets.digest(base), Server(base)
    real, free = os.statvfs, 2**30 + 600
    monkeypatch.setattr(
        os, "statvfs", lambda path: os.statvfs_result((1, 1, 2**40, free, free, *tuple(real(path))[5:10]))
    )
    with pytest.raises(
        AntherError, match=r"0\.00 GiB are needed, 1\.00 GiB are free.*fetch\.min_free_gib=1 GiB must stay free"
    ):
        fetch(wanted, FetchConfig(), server)
    assert server.asked == []
    assert fetch(wanted, FetchConfig(min_free_gib=0.9), server)


def test_a_disk_that_fills_up(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, server, real, room = assets.digest(base), Server(base), os.pwrite, 300

    def filling(handle: int, data: memoryview, offset: int) -> int:
        nonlocal room
        if (written := min(len(data), room)) == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room -= written
        return real(handle, data[:written], offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", filling)
        with pytest.raises(AntherError, match="the disk is full; the downloaded part is kept: free"):
            fetch(wanted, FREE, server)
    again = Server(base)
    assert assets.digest(fetch(wanted, FREE, again)) == wanted
    assert again.sent < 450


def test_two_at_once(base: Path) -> None:
    wanted, server = assets.digest(base), Server(base)
    refusals = []

    def second(_done: int, _total: int) -> None:
        if not refusals:
            with pytest.raises(AntherError, match=f"in use by process {os.getpid()}") as raised:
                fetch(wanted, FREE, server)
            refusals.append(raised)

    fetch(wanted, FREE, server, progress=second)
    assert refusals


def test_from_a_folder_of_the_same_disk_it_is_linked(base: Path, home: Path) -> None:
    wanted = assets.digest(base)
    found = fetch(wanted, FetchConfig(folder=str(base)))
    assert found == home / "assets" / wanted / "tiny-base" == assets.locate(wanted)
    assert found.is_symlink()
    shutil.rmtree(base)  # the link leads nowhere: it is fetched again
    with pytest.raises(AntherError, match="doesn't exist"):
        fetch(wanted, FetchConfig(folder=str(base)))


def test_from_a_stick_it_is_copied(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, real = assets.digest(base), Path.stat

    def elsewhere(path: Path, **options: bool) -> os.stat_result:
        found = real(path, **options)
        return os.stat_result((*found[:2], found.st_dev + (path == base), *found[3:10]))

    monkeypatch.setattr(Path, "stat", elsewhere)
    found = fetch(wanted, FetchConfig(folder=str(base), min_free_gib=0))
    shutil.rmtree(base)
    assert not found.is_symlink()
    assert assets.digest(found) == wanted


def test_sources_in_their_order_and_why_none_had_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, other = assets.digest(base), tmp_path / "other"
    shutil.copytree(base, other)
    (other / "model_index.json").write_text("{}")
    asked = []

    def from_hub(name: str) -> Path:
        asked.append(name)
        return other

    monkeypatch.setattr(hub, "fetch", from_hub)
    settings = FetchConfig(folder=str(tmp_path / "none"), hub="maker/base", min_free_gib=0)
    with pytest.raises(AntherError, match=r"folder: .* doesn't exist; hub: .* contains another base.*; server: not"):
        fetch(wanted, settings)
    assert asked == ["maker/base"]
    with pytest.raises(AntherError, match=r"fetched: folder: fetch\.folder: .* doesn't exist$"):
        fetch(wanted, FetchConfig(source="folder", folder=str(tmp_path / "none")), Server(base))
    assert assets.digest(fetch(wanted, settings, Server(base))) == wanted
    with pytest.raises(AntherError, match="not a content hash"):
        fetch("../x", settings)


def test_what_a_server_answers_that_isnt_a_base() -> None:
    def answering(status: int) -> AntherError | ConnectionError:
        client = httpx.Client(
            transport=httpx.MockTransport(lambda _: httpx.Response(status, content=b"x" * 10)), base_url="https://pi:1"
        )
        with pytest.raises((AntherError, ConnectionError)) as raised:
            list(http_get(client)("/x", 0, 5))
        return raised.value

    for status, said in {
        401: "ask its operator",
        404: "doesn't have this base",
        200: "answers 200",
        302: "answers 302",
    }.items():
        found = answering(status)
        assert isinstance(found, AntherError)
        assert said in str(found)
        assert "pi:1" in str(found)
    for status in (429, 500, 503):
        assert isinstance(answering(status), ConnectionError)


def test_a_connection_that_breaks_off_may_be_tried_again() -> None:
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
