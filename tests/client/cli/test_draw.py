"""Drawing with a device's learned adapters."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.cli.draw import main
from client.store.store import PersonalAdapter, Store
from common.seeding import derive_seed
from models.base.base import Base
from models.lora.adapter import Adapter, Factors, init_adapter
from privacy.storage import FileStorage
from training import inference
from training.capacity import budget

CAPTIONS = ["a b", "c"]
SITES = r".*attn1\.to_(q|v)"  # fewer than the family's sites: the adapter's sites are used


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def fresh(pipeline_folder: Path) -> Base:
    return Base(pipeline_folder, sites=SITES)


def live(base: Base, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    created = init_adapter(base.sites, 2, seed)
    return {name: Factors(a, torch.randn(b.shape, generator=generator)) for name, (a, b) in created.items()}


def merged(folder: Path, *adapters: Adapter) -> list[np.ndarray]:
    """Draw with B A added to the weights, instead of with adapters."""
    base = Base(folder, sites=SITES)
    for adapter in adapters:
        for name, (a, b) in adapter.items():
            base.network.get_submodule(name).base.weight += b @ a
    seeds = [derive_seed(0, caption, "draw") for caption in CAPTIONS]
    latents = inference.generate(
        base, CAPTIONS, seeds, [], [0, 0], sampler="dpm", steps=3, guidance=2.0, memory=budget(None, base.device)
    )
    return list(base.decode(latents))


@pytest.mark.integration
@pytest.mark.parametrize(("under", "parts"), [("personal", 2), ("shared", 1), ("base", 0)])
def test_drawing_equals_merged_weights(
    under: str, parts: int, fresh: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, personal = live(fresh, 1), live(fresh, 2)
    Store(FileStorage(tmp_path / "store")).save_personal(PersonalAdapter(personal, shared, fresh.hash, "run:1"))
    options = ["--base", str(fresh.folder), "--steps", "3", "--guidance", "2", "--out", str(tmp_path / "out")]
    options += ["--guide-strength", "1"]
    assert main([*CAPTIONS, *options, "--under", under, "--store", str(tmp_path / "store")]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    part = "" if under == "personal" else f"-{under}"  # the two are added
    assert [file.name for file in files] == [f"01{part}-a-b.png", f"02{part}-c.png"]
    expected = merged(fresh.folder, *(shared, personal)[:parts])
    for file, picture in zip(files, expected, strict=True):
        assert np.abs(np.asarray(Image.open(file)).astype(int) - picture.astype(int)).max() <= 1
    if parts:
        assert (expected[0] != merged(fresh.folder)[0]).any()


@pytest.mark.integration
def test_guidance_strengthens_the_personal_adapter(fresh: Base, tmp_path: Path) -> None:
    """With only the shared adapter, both kinds of guidance are one."""
    shared, personal = live(fresh, 1), live(fresh, 2)
    Store(FileStorage(tmp_path / "store")).save_personal(PersonalAdapter(personal, shared, fresh.hash, "run:1"))
    drawn = {}
    for guide, under in itertools.product(("0", "1"), ("personal", "shared")):
        out = tmp_path / f"{guide}-{under}"
        steps = ["--steps", "3", "--guidance", "2"]
        options = ["--base", str(fresh.folder), *steps, "--guide-strength", guide, "--under", under]
        assert main([CAPTIONS[0], *options, "--out", str(out), "--store", str(tmp_path / "store")]) == 0
        drawn[guide, under] = np.asarray(Image.open(next(out.iterdir()))).astype(int)
    assert (drawn["0", "shared"] == drawn["1", "shared"]).all()
    assert (drawn["0", "personal"] != drawn["1", "personal"]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing was learned here yet"),
        (["--steps", "0"], "--steps 0: must be 1 to 1000"),
        (["--guide-strength", "-0.1"], "--guide-strength -0.1: must be 0 to 1"),
        (["--guide-strength", "nan"], "--guide-strength nan: must be 0 to 1"),
        (["--guidance", "0"], "--guidance 0.0: must be 1 to 1000"),
        (["--guidance", "nan"], "--guidance nan: must be 1 to 1000"),
        (["--guidance", "inf"], "--guidance inf: must be 1 to 1000"),
        (["--resolution", "-16"], "--resolution -16: must be 8 to 8192"),
        (["--resolution", "0"], "--resolution 0: must be 8 to 8192"),
        (["--tile", "-1"], "--tile -1: must be 0 to 8192"),
        (["--seed", "-1"], "--seed -1: must be 0 to"),
        (["--out", "cat.PNG"], "--out cat.PNG: must be a folder"),
        (["--out", __file__], "test_draw.py: must be a folder"),
        (["--resolution", "17", "--under", "base"], "17 pixels: must be a multiple"),
        (["--tile", "5", "--under", "base"], "tiles of 5 pixels: must be a multiple of 16"),
        (["--small-vae", "nowhere", "--under", "base"], "nowhere: holds no safetensors"),
    ],
)
def test_errors_are_one_line(
    options: list[str], words: str, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["a", "--base", str(pipeline_folder), "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    assert main([*common, "--steps", "1", *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert words in errors
    assert not (tmp_path / "out").exists()


def test_adapter_of_another_base_is_refused(fresh: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(FileStorage(tmp_path / "store")).save_personal(
        PersonalAdapter(live(fresh, 1), live(fresh, 2), "f" * 64, "run:1")
    )
    assert main(["a", "--base", str(fresh.folder), "--store", str(tmp_path / "store")]) == 2
    assert "belongs to another base (ffffffffffff)" in capsys.readouterr().err
