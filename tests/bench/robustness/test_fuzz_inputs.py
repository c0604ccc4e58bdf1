"""Tests that the input fuzzer finds no faults in the code, and does report planted ones."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from bench.robustness import damaged_pictures, fuzz_inputs
from bench.robustness.fuzz_inputs import KINDS, run_cases
from client import data
from client.data import stored_picture


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["picture", "exif", "sheet", "layout", "base"])
def test_damaged_inputs_are_read_or_refused(kind: str) -> None:
    count = 10 if kind == "base" else 40
    row = run_cases(kind, range(count))
    assert row.faults == []
    assert row.read + row.refused == count
    assert row.refused > 0


def test_faults_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a decoder's exceptions are not converted to one-line errors, the fuzzer reports them."""

    def undecoded(self: data.StoredPicture, side: int | None) -> object:
        raise NotImplementedError("a decoder's own")

    monkeypatch.setattr(data.StoredPicture, "_read", undecoded)
    monkeypatch.setattr(stored_picture, "_verified", set())
    row = run_cases("exif", range(5))
    assert len(row.faults) == 5
    assert row.faults[0].startswith("exif 0: NotImplementedError")


@pytest.mark.parametrize("line", ["two\nlines", "an error that names no place"])
def test_malformed_refusals_are_faults(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from common.errors import AntherError

    class RawError(AntherError):
        def __str__(self) -> str:
            return line

    def attempt(rng: random.Random, folder: Path) -> fuzz_inputs.Try:
        del rng, folder

        def refuse() -> None:
            raise RawError

        return refuse

    monkeypatch.setitem(KINDS, "raw", attempt)
    assert run_cases("raw", range(1)).faults


def test_cases_are_reproducible(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        KINDS["picture"](random.Random("picture 7"), tmp_path / name)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


@pytest.mark.parametrize("kind", ["picture", "exif", "sheet", "layout"])
def test_generators_write_only_to_their_folder(tmp_path: Path, kind: str) -> None:
    """They may run as root, so no link may lead to a file of the machine."""
    for seed in range(60):
        folder = tmp_path / str(seed) / "photos"
        folder.mkdir(parents=True)
        KINDS[kind](random.Random(f"{kind} {seed}"), folder)
        others = [file.name for file in folder.parent.iterdir() if file != folder]
        assert others in ([], ["outside.txt"])
        if others:
            assert (folder.parent / "outside.txt").read_text().startswith("not a picture")
        links = [path for path in folder.rglob("*") if path.is_symlink()]
        leads = (Path(os.path.normpath(path.parent / path.readlink())) for path in links)
        assert all(lead.is_relative_to(folder.parent) for lead in leads)


def test_links_are_not_followed(tmp_path: Path) -> None:
    folder, victim = tmp_path / "photos", tmp_path / "outside.txt"
    folder.mkdir()
    victim.write_text("precious")
    for name in ("metadata.jsonl", "a.png"):
        (folder / name).symlink_to(victim)
    (folder / "train").symlink_to(tmp_path)
    damaged_pictures._sheet(folder, [{"file_name": "a.png", "text": "x"}])
    damaged_pictures._put(folder, "a.png")
    damaged_pictures._put(folder, "train/b.png")
    damaged_pictures._sheet(folder, [], "train")
    assert victim.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside.txt", "photos"]
