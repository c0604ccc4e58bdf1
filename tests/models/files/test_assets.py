import hashlib
import json
import shutil
from pathlib import Path

import pytest

from common.errors import AntherError
from models.files import assets

ROOT = Path(__file__).parents[3]
SHIPPED = json.loads(assets.MANIFEST.read_text())


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_manifest_lists_shipped_assets(name: str) -> None:
    assert assets.digest(ROOT / SHIPPED[name]["path"]) == SHIPPED[name]["sha256"]


def test_pin_hashes_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "models" / "files" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"small": {"path": "typefaces/small.txt", "sha256": "that of an earlier file"}}))
    (tmp_path / "typefaces").mkdir()
    (tmp_path / "typefaces" / "small.txt").write_text("abc")
    monkeypatch.setattr(assets, "MANIFEST", manifest)
    monkeypatch.setattr(assets, "_installed", lambda path: iter([tmp_path / path]))
    monkeypatch.setattr("sys.argv", ["anther assets", "--pin"])
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    assert assets.main() == 0
    sha256 = hashlib.sha256(b"abc").hexdigest()
    assert json.loads(manifest.read_text())["small"]["sha256"] == sha256
    assert sha256 in capsys.readouterr().out


def test_asset_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    stored = assets.locate("judge")
    assert stored.parent == tmp_path / "assets" / SHIPPED["judge"]["sha256"]
    assert assets.digest(stored) == SHIPPED["judge"]["sha256"]
    (stored / "mark").touch()
    assert (assets.locate("judge") / "mark").exists()
    assert [path.name for path in (tmp_path / "assets").iterdir()] == [SHIPPED["judge"]["sha256"]]


def test_help_copies_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    for arguments, status in ((["--help"], 0), (["judge"], 2)):  # it takes no names
        monkeypatch.setattr("sys.argv", ["anther assets", *arguments])
        with pytest.raises(SystemExit) as stopped:
            assets.main()
        assert stopped.value.code == status
    assert "usage: anther assets" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_bundle_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    monkeypatch.setattr(assets, "_installed", lambda path: iter([tmp_path / path]))
    with pytest.raises(AntherError, match=r"anther assets"):
        assets.locate("judge")


def test_damaged_asset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = Path(shutil.copytree(ROOT / SHIPPED["judge"]["path"], tmp_path / "judge"))
    (damaged / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(assets, "_installed", lambda _: iter([damaged]))
    with pytest.raises(AntherError, match="judge"):
        assets.locate("judge")


def test_locate_accepts_a_path(tmp_path: Path) -> None:
    assert assets.locate(str(tmp_path)) == tmp_path


def test_locate_accepts_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    shipped = SHIPPED["judge"]["sha256"]
    assert assets.locate(shipped) == assets.locate("judge")
    own = tmp_path / "assets" / ("a" * 64) / "own"
    own.mkdir(parents=True)
    assert assets.locate("a" * 64) == own
    (own.parent / "another").mkdir()
    for sha256 in ("a" * 64, "b" * 64):
        with pytest.raises(AntherError, match="no base of this hash"):
            assets.locate(sha256)


def test_folder_digest(tmp_path: Path) -> None:
    for name in ("a-b.json", "a/b.json", "a/c/d.txt", "a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    lines = "".join(f"{file.relative_to(tmp_path).as_posix()}\0{assets.digest(file)}\n" for file in files)
    assert assets.digest(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


def test_digest_ignores_macos_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    before = assets.digest(tmp_path)
    (tmp_path / "._a.json").write_bytes(b"x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert assets.digest(tmp_path) == before
    assert [file.name for file in assets.identity_files(tmp_path)] == ["a.json"]


def test_user_without_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")  # as for an unknown user id

    monkeypatch.delenv("ANTHER_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(AntherError, match="set ANTHER_HOME"):
        assets.home()


def test_home_that_is_a_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["assets"])
    assert assets.main() == 2
    with pytest.raises(AntherError, match=r"in the way.*set ANTHER_HOME to another folder"):
        assets.locate("glyphs")
