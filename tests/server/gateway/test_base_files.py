"""The server serves files of its bases, whole or in ranges, and no other files."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from common.errors import AntherError
from models.files import assets, chunk_manifest
from server.gateway.base_files import BaseFiles, routes


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "x.safetensors").write_bytes(bytes(range(200)))
    (folder / "secret.key").write_text("not handed out")
    return folder


def client(*folders: Path) -> TestClient:
    return TestClient(Starlette(routes=routes(BaseFiles(folders))))


def test_serves_whole_files_and_ranges(base: Path) -> None:
    http, wanted = client(base), assets.digest(base)
    manifest = http.get(f"/v1/anther/base/{wanted}/manifest")
    assert chunk_manifest.decode_manifest(manifest.content, wanted) == chunk_manifest.build(base)
    path = f"/v1/anther/base/{wanted}/file/1"
    assert http.get(path).content == bytes(range(200))
    part = http.get(path, headers={"Range": "bytes=50-59"})
    assert (part.status_code, part.content) == (206, bytes(range(50, 60)))
    assert part.headers["content-range"] == "bytes 50-59/200"
    assert http.get(path, headers={"Range": "bytes=200-"}).status_code == 416


def test_several_ranges_are_refused(base: Path) -> None:
    """Thousands of ranges in one request would cost seconds."""
    http, path = client(base), f"/v1/anther/base/{assets.digest(base)}/file/1"
    for ranges in (["0-1", "3-4"], ["0-1"] * 1000):
        assert http.get(path, headers={"Range": "bytes=" + ",".join(ranges)}).status_code == 416


@pytest.mark.parametrize(
    "path",
    [
        "{base}/file/2",
        "{base}/file/-1",
        "{base}/file/01",
        "{base}/file/secret.key",
        "{base}/file/..%2Fsecret.key",
        "{base}/file/../../secret.key",
        "{base}/file/%00",
        "{base}/file/" + "9" * 5000,
        "{other}/file/0",
        "{other}/manifest",
        "../base/manifest",
        "{base}/file/",
    ],
)
def test_other_paths_are_not_served(path: str, base: Path) -> None:
    reply = client(base).get("/v1/anther/base/" + path.format(base=assets.digest(base), other="0" * 64))
    assert reply.status_code == 404
    assert "not handed out" not in reply.text


def test_symlinks_of_the_hub_cache(base: Path, tmp_path: Path) -> None:
    (base / "unet" / "x.safetensors").rename(tmp_path / "blob")
    (base / "unet" / "x.safetensors").symlink_to(tmp_path / "blob")
    http = client(base)
    path = f"/v1/anther/base/{assets.digest(base)}/file/1"
    assert http.get(path).content == bytes(range(200))
    (tmp_path / "blob").unlink()
    assert http.get(path).status_code == 410


def test_unservable_base_is_refused(base: Path) -> None:
    (base / "my notes.txt").write_text("x")
    with pytest.raises(AntherError, match="my notes"):
        BaseFiles([base])
