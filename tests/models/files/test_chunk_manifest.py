"""A manifest has its base's content hash, and untrusted manifests are validated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import AntherError
from models.files import assets, chunk_manifest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder like that of a base, with several chunks."""
    monkeypatch.setattr(chunk_manifest, "CHUNK", 64)
    folder = tmp_path / "tiny-base"
    for name, size in {
        "model_index.json": 10,
        "unet/x.safetensors": 200,
        "unet-b/config.json": 64,
        "a/e.txt": 0,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(hashlib.shake_256(name.encode()).digest(size))
    (folder / "README.md").write_text("a card, which doesn't count")
    (folder / "metrics.json").write_text("nor does this")
    return folder


def test_manifest_has_the_content_hash() -> None:
    folder = ROOT / "typefaces/assets/glyphs-base"
    manifest = chunk_manifest.build(folder)
    assert manifest.base == assets.digest(folder)
    assert manifest.name == "glyphs-base"
    assert manifest.total == sum(file.stat().st_size for file in assets.identity_files(folder))
    assert chunk_manifest.decode_manifest(manifest.encode(), manifest.base) == manifest
    assert chunk_manifest.verify(folder, manifest.base)


def test_verify_detects_other_chunks(base: Path) -> None:
    manifest = chunk_manifest.build(base)
    assert manifest.base == assets.digest(base)
    assert [(file.name, len(file.chunks)) for file in manifest.files] == [
        ("a/e.txt", 0),
        ("model_index.json", 1),
        ("unet/x.safetensors", 4),
        ("unet-b/config.json", 1),
    ]
    file = manifest.files[2]
    content = (base / file.name).read_bytes()
    assert file.span(3) == (192, 8)
    assert all(file.verify(index, content[index * 64 :][:64]) for index in range(4))
    assert not file.verify(0, content[64:128])
    assert not file.verify(3, content[192:199])


def content(base: Path) -> dict[str, Any]:
    return json.loads(chunk_manifest.build(base).encode())


def rename_file(name: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][0]["name"] = name

    return change


def set_value(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "/etc/x.json",
        "a/../../x.json",
        "a//x.json",
        "./x.json",
        "",
        ".x.json",
        "a/.git/x.json",
        "a\\x.json",
        "a/x.json\0",
        "C:/x.json",
        "a\nb.json",
        "x.py",
        "x",
        "unet",
        "metrics.json",
        "a/" * 9 + "x.json",
        "x" * 200 + ".json",
        "model_index.json",
        "MODEL_INDEX.JSON",
        "model_index.json/x.json",
        "~/x.json",
        7,
        None,
        ["a.json"],
        "é.json",
    ],
)
def test_unsafe_names_are_refused(name: object, base: Path) -> None:
    manifest = content(base)
    rename_file(name)(manifest)
    manifest["base"] = assets.combined_digest((str(file["name"]), file["sha256"]) for file in manifest["files"])
    with pytest.raises(AntherError, match="is invalid") as raised:
        chunk_manifest.decode_manifest(json.dumps(manifest).encode(), manifest["base"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        set_value("format", value=2),
        set_value("files", value=[]),
        set_value("files", value={}),
        set_value("files", value=[[]]),
        set_value("name", value=".."),
        set_value("name", value="a/b"),
        set_value("name", value=None),
        set_value("more", value=1),
        set_value("files", 0, "size", value=-1),
        set_value("files", 0, "size", value=True),
        set_value("files", 0, "size", value=1.0),
        set_value("files", 0, "size", value=10**30),
        set_value("files", 0, "chunks", value=["0" * 64]),
        set_value("files", 1, "chunks", value=["0" * 63]),
        set_value("files", 1, "chunks", value=[7]),
        set_value("files", 0, "sha256", value="x" * 64),
        set_value("files", 0, "more", value=1),
        set_value("base", value="0" * 64),
        set_value("files", 0, "sha256", value="0" * 64),
    ],
)
def test_invalid_manifest_is_refused(change: Callable[[Any], None], base: Path) -> None:
    manifest = content(base)
    sha256 = manifest["base"]
    change(manifest)
    with pytest.raises(AntherError):
        chunk_manifest.decode_manifest(json.dumps(manifest).encode(), sha256)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 100_000, b"1" * 5000, b"null"])
def test_non_object_is_refused(data: bytes) -> None:
    with pytest.raises(AntherError, match="is invalid"):
        chunk_manifest.decode_manifest(data, "0" * 64)


def test_limits(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = chunk_manifest.build(base)
    for limit, value in {"MAX_MANIFEST_BYTES": 100, "MAX_FILES": 3, "MAX_BYTES": 250}.items():
        with monkeypatch.context() as patched:
            patched.setattr(chunk_manifest, limit, value)
            with pytest.raises(AntherError):
                chunk_manifest.decode_manifest(manifest.encode(), manifest.base)


def test_build_refuses_unsafe_names(base: Path) -> None:
    (base / "my notes.txt").write_text("x")
    with pytest.raises(AntherError, match=r"tiny-base: can't be served to devices.*my notes\.txt"):
        chunk_manifest.build(base)
