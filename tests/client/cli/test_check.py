"""`anther device doctor`: one line for each file, the exit status, and the contact sheet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.cli.check import DONE, USAGE, main
from client.data.contact_sheet import square_crop

TALL = np.zeros((40, 20, 3), np.uint8)


@pytest.fixture
def album(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    folder = tmp_path / "photos"
    (folder / "train").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(TALL).save(folder / "train/a.jpg", exif=exif)
    Image.fromarray(TALL).save(folder / "train/b c.png")
    (folder / "train/a.txt").write_text("a cat\nthe cat")
    (folder / "train/b c.txt").write_text("a dog")
    (folder / "train/.DS_Store").write_bytes(b"")
    (folder / "Thumbs.db").write_bytes(b"")
    (folder / "film.mp4").write_bytes(b"")
    return folder


def test_each_file_has_one_line(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(album)]) == DONE
    assert capsys.readouterr().out.splitlines() == [
        "skipped    Thumbs.db: hidden, or of the operating system",
        "skipped    film.mp4: not a picture",
        "skipped    train/.DS_Store: hidden, or of the operating system",
        'converted  train/a.jpg: train; 40×20; turned upright; "a cat" | "the cat"',
        'used       train/b c.png: train; 20×40; "a dog"',
        "2 train, 0 validation, 0 test; 1 converted, 3 skipped, 1 used",
    ]


def test_refused_files(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (album / "train/b c.png").write_bytes(b"")
    for name in ("d.png", "e.png"):
        Image.fromarray(TALL).save(album / "train" / name)
    assert main([str(album)]) == USAGE
    lines = capsys.readouterr().out.splitlines()
    assert "refused    train/b c.png: is empty; copy it again" in lines
    assert any(line.startswith("refused    train/d.png: has no caption (and 1 more); add a line") for line in lines)
    assert "refused    train/e.png: has no caption" in lines
    assert main([str(album), "--quiet"]) == USAGE
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1


def test_caption_of_the_command_line(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(album), "--caption", "sks, {text}"]) == DONE
    assert '"sks, a cat" | "sks, the cat"' in capsys.readouterr().out
    assert main([str(album), "--quiet", "--caption=one for all"]) == DONE


def test_enrolled_folder_is_the_default(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == USAGE
    assert "no folder of pictures is enrolled" in capsys.readouterr().err
    (album.parent / "home").mkdir()
    (album.parent / "home/node.conf").write_text(f"data={album}\ncaption='a photo of sks'\n")
    assert main([]) == DONE
    assert '"a photo of sks"' in capsys.readouterr().out


def test_missing_folder_is_one_line(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(album / "none")]) == USAGE
    assert "none: no such folder" in capsys.readouterr().out


def test_second_name_of_a_file_is_skipped(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (album / "train/link.png").symlink_to("b c.png")
    (album / "train/link.txt").write_text("again")
    main([str(album)])
    assert "skipped    train/link.png: the same file as train/b c.png" in capsys.readouterr().out


def test_text_file_beside_listed_picture_is_skipped(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (album / "train/metadata.jsonl").write_text(json.dumps({"file_name": "b c.png", "text": "listed"}))
    assert main([str(album)]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert "skipped    train/b c.txt: train/b c.png has another caption" in lines
    assert not any("train/a.txt" in line for line in lines)


def test_contact_sheet(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = album.parent / "sheet.png"
    assert main([str(album), "--sheet", str(file)]) == DONE
    with Image.open(file) as image:
        sheet = np.array(image)
    red = (sheet == (0xD0, 0x20, 0x20)).all(-1)
    assert red[:, : sheet.shape[1] // 2].any()
    assert red[:, sheet.shape[1] // 2 :].any()
    assert main([str(album), "--sheet", str(album / "sheet.png")]) == USAGE
    assert "lies in the folder of pictures" in capsys.readouterr().err
    assert main([str(album), "--sheet", str(album.parent / "none/sheet.png")]) == USAGE


def test_crop_is_the_centered_square() -> None:
    assert square_crop((30, 20)) == (5, 0, 25, 20)
    assert square_crop((20, 31)) == (0, 5.5, 20, 25.5)
