"""Names and expressions of sites, compared to the layers of the network itself."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from bench.lib.tiny import ATTENTION
from common.errors import AntherError
from models.diffusion.sites import SITE_NAMES, exact_pattern, find_sites, named_sites, resolve_sites
from models.lora.adapter import Site

FEED_FORWARD = r".*ff\.net\.(0\.proj|2)"
TIME = r"time_embedding\.linear_[12]|.*time_emb_proj"
CONVOLUTIONS = r".*\.conv[12]|.*conv_shortcut|.*samplers\.0\.conv|conv_in|conv_out|.*proj_(in|out)"
LAYERS = {"conv_in": Site(36, 8, (3, 3)), "up.attn1.to_q": Site(8, 8), "up.ff": Site(8, 16), "all": Site(4, 4)}


@pytest.fixture(scope="module")
def unet(pipeline_folder) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(pipeline_folder / "unet").eval()


def test_pattern_matches_full_names(unet: nn.Module) -> None:
    able = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for pattern in (ATTENTION, FEED_FORWARD, TIME, CONVOLUTIONS, ".*"):
        sites = find_sites(unet, pattern)
        assert list(sites) == [name for name in able if re.fullmatch(pattern, name)]
        for name, site in sites.items():
            weight = able[name].weight
            assert (site.outputs, site.inputs, site.kernel) == (len(weight), weight[0].numel(), weight.shape[2:])
    parts = [set(find_sites(unet, pattern)) for pattern in (ATTENTION, FEED_FORWARD, TIME, CONVOLUTIONS)]
    assert set.union(*parts) == set(able)
    assert sum(map(len, parts)) == len(able)


def test_unsupported_layers_are_excluded() -> None:
    with torch.device("meta"):
        network = nn.ModuleDict(
            {
                "grouped": nn.Conv2d(4, 4, 3, groups=2),
                "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
                "transposed": nn.ConvTranspose2d(4, 4, 3),
                "flat": nn.Conv1d(4, 4, 3),
                "normal": nn.GroupNorm(2, 4),
                "able": nn.Conv2d(4, 6, (3, 1)),
            }
        )
    assert find_sites(network, "all") == find_sites(network, ".*") == {"able": Site(12, 6, (3, 1))}


def test_names() -> None:
    assert list(resolve_sites(LAYERS, None)) == list(resolve_sites(LAYERS, "attention")) == ["up.attn1.to_q"]
    assert list(resolve_sites(LAYERS, "attention", attention=r"up\.ff")) == ["up.ff"]
    assert list(resolve_sites(LAYERS, "linear")) == ["up.attn1.to_q", "up.ff", "all"]
    assert resolve_sites(LAYERS, "all") == LAYERS
    assert named_sites(LAYERS) == {name: set(resolve_sites(LAYERS, name)) for name in SITE_NAMES}
    assert named_sites({"x": Site(4, 4, (1, 1))})["linear"] == set()
    assert list(resolve_sites(LAYERS, exact_pattern(["all"]))) == ["all"]  # a layer with a set's name
    assert list(resolve_sites(LAYERS, exact_pattern(["up.ff", "conv_in"]))) == ["conv_in", "up.ff"]


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("(", r"adapter.sites=\(: not a regular expression"),
        ("conv", "adapter.sites=conv: matches no layer of the base, such as conv_in; use attention, linear, all"),
        ("Linear", "adapter.sites=Linear: matches no layer"),
    ],
)
def test_other_values_are_refused(sites: str, message: str) -> None:
    with pytest.raises(AntherError, match=message) as refusal:
        resolve_sites(LAYERS, sites)
    assert "\n" not in str(refusal.value)
    with pytest.raises(AntherError, match="fleet: sites=linear: matches no layer of the base"):
        resolve_sites({"conv": Site(4, 4, (1, 1))}, "linear", key="fleet: sites")
