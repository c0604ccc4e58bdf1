"""Known networks have the parameters that are published of them, and any in a folder is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conf.errors import AntherError
from models.architectures import ATTENTION, BUILT_IN, find
from models.denoiser import find_sites

MILLIONS = {  # of parameters, as papers, cards and other people's loaders give them; checked to half a per cent
    "sd15": 859.5, "bk_sdm_small": 482, "bk_sdm_tiny": 323, "sd21": 865.9, "sdxl": 2567, "pixart_sigma": 611,
    "sana_600m": 592, "sd35_medium": 2243, "flux_dev": 11901,
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT_IN)
def test_as_many_parameters_as_published(name: str) -> None:
    network = BUILT_IN[name].build()
    assert all(parameter.is_meta for parameter in network.parameters())
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[name], rel=0.005)


@pytest.mark.parametrize(("name", "sites"), [("sd15", 128), ("sdxl", 560), ("pixart_sigma", 224)])
def test_every_projection_of_attention_is_a_site(name: str, sites: int) -> None:
    assert len(find_sites(BUILT_IN[name].build(), ATTENTION)) == sites


def test_a_folder_is_read(pipeline_folder: Path) -> None:
    found = find(str(pipeline_folder))
    assert (found.kind, found.scale, found.resolution, found.tokens) == ("UNet2DConditionModel", 2, 16, 8)
    inputs = found.inputs(16)(3)
    assert inputs["sample"].shape == (3, 4, 8, 8)
    assert inputs["encoder_hidden_states"].shape == (3, 8, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "unet"), "neither unet/config.json nor transformer/config.json"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), "can't be read"),
        (lambda folder: shutil.rmtree(folder / "vae"), "can't be read"),
        (lambda folder: (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "X"})), "is a X"),
    ],
)
def test_what_can_not_be_read_is_told(pipeline_folder: Path, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(pipeline_folder, folder := tmp_path / "base")
    change(folder)
    with pytest.raises(AntherError, match=message) as raised:
        find(str(folder))
    assert "\n" not in str(raised.value)


def test_a_name_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AntherError, match=r"sd16: no such folder.*nor a configuration that is known here \(sd15"):
        find("sd16")
