"""Published bases at full size, on the meta device."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from common.errors import AntherError
from models.diffusion.sites import find_sites
from models.families.known import KNOWN_BASES, find_base
from tests.helpers.samples import sampled

PUBLISHED = {  # published millions of parameters
    "sd15": 859.52,
    "sd21": 865.91,
    "bk-sdm-base": 579.38,
    "bk-sdm-small": 482.35,
    "bk-sdm-tiny": 323.38,
    "sdxl": 2567.46,
    "pixart-sigma": 610.86,
    "sd35-medium": 2243.17,
    "sd35-large": 8056.63,
    "flux-dev": 11901.41,
    "flux-schnell": 11891.18,
    "sana-1600m": 1604.46,
    "sana-600m": 591.75,
}

ATTENTIONS = {  # each has four projections, and further ones for text in joint attention
    "sd15": 2 * 16 * 4,
    "sd21": 2 * 16 * 4,
    "bk-sdm-base": 2 * 10 * 4,
    "bk-sdm-small": 2 * 9 * 4,
    "bk-sdm-tiny": 2 * 9 * 4,
    "sdxl": 2 * 70 * 4,
    "pixart-sigma": 2 * 28 * 4,
    "sd35-medium": 24 * 8 - 1 + 13 * 4,
    "sd35-large": 38 * 8 - 1,  # the last block has no text output
    "flux-dev": 19 * 8 + 38 * 3,
    "flux-schnell": 19 * 8 + 38 * 3,
    "sana-1600m": 2 * 20 * 4,
    "sana-600m": 2 * 28 * 4,
}


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", sampled(KNOWN_BASES, ["sd15", "bk-sdm-tiny", "sdxl", "pixart-sigma", "sd35-medium", "sana-600m"])
)
def test_published_sizes(name: str) -> None:
    base = KNOWN_BASES[name]
    network = base.network()
    assert all(parameter.is_meta for parameter in network.parameters())
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2) == PUBLISHED[name]
    assert len(find_sites(network, base.family.sites)) == ATTENTIONS[name]
    config = base.full_config()
    assert config.items() <= dict(network.config).items()
    channels, side, patch = base.family.latents(config)
    assert side % patch == 0
    x = torch.empty(2, channels, side, side, device="meta")
    t, context = torch.empty(2, device="meta"), torch.empty(2, *base.family.context(config), device="meta")
    with torch.no_grad():
        assert base.family.forward(network, x, t, context).shape == x.shape


def test_folder_needs_no_weights(pipeline_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    copy = shutil.copytree(pipeline_folder, tmp_path / "base")
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    spec, real = find_base(str(copy)), UNet2DConditionModel.from_pretrained(pipeline_folder, subfolder="unet")
    assert spec.scale == 2
    assert spec.family.pipeline == "StableDiffusionPipeline"
    shapes = {name: tensor.shape for name, tensor in spec.network().state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in real.state_dict().items()}


def test_other_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match=r"no model_index\.json"):
        find_base(str(tmp_path))


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AntherError, match=r"sd99: no such folder.*published base.*sd15"):
        find_base("sd99")
