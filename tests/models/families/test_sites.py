"""The named sets of sites of every family, compared to peft and to the classes of the layers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from models.base.base import Base
from models.base.pack import pack
from models.diffusion.sites import SITE_NAMES, find_sites
from models.export.layouts import export, kohya_keys
from models.families.checkpoint import recognize
from models.families.known import KNOWN_BASES
from protocol.messages import MAX_JSON_CHARS
from tests.helpers.adapters import random_adapter
from tests.models.conftest import TinyPipeline
from tests.models.families.test_families import load_adapter

ATTENTION = r".*\.attn[12]?\.(to_(q|k|v|out\.0|add_out)|add_[qkv]_proj)"  # the default sites since the first version


def test_names_are_nested(tiny: TinyPipeline) -> None:
    network, family = recognize(tiny.folder).load(tiny.base.family.network), tiny.base.family
    attention, linear, every = (find_sites(network, name, attention=family.sites) for name in SITE_NAMES)
    assert 0 < len(attention) < len(linear) <= len(every)  # Flux has no convolution
    assert attention.items() <= linear.items() <= every.items()
    assert list(attention) == list(find_sites(network, ATTENTION)) == list(tiny.base.sites)
    assert list(every) == list(find_sites(network, ".*"))
    layers = dict(network.named_modules())
    assert set(linear) == {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    assert {type(layers[name]) for name in every.keys() - linear.keys()} <= {nn.Conv2d}
    pattern = r".*\.to_q"
    assert list(find_sites(network, pattern)) == [name for name in every if re.fullmatch(pattern, name)]


def test_linear_is_all_linear_of_peft(tiny: TinyPipeline) -> None:
    network = recognize(tiny.folder).load(tiny.base.family.network)
    linear = set(find_sites(network, "linear"))
    inject_adapter_in_model(LoraConfig(r=1, target_modules="all-linear"), network)
    adapted = {name.removesuffix(".lora_A") for name, _ in network.named_modules() if name.endswith(".lora_A")}
    assert adapted == linear


@pytest.mark.integration
@pytest.mark.parametrize("name", ["linear", "all"])
def test_every_site_is_exported(tiny: TinyPipeline, name: str, tmp_path: Path) -> None:
    """diffusers receives all of them; kohya's layout has a name for each."""
    base, file = Base(tiny.folder, sites=name, resolution=tiny.base.resolution), tmp_path / "adapter.safetensors"
    adapter = random_adapter(base.sites, 2, seed=1)
    export(adapter, file, family=base.family, sites=base.sites)
    pipeline = tiny.pipeline()
    load_adapter(pipeline, file)
    network = getattr(pipeline, base.family.network)
    received = {name.rpartition(".lora_A")[0] for name, _ in network.named_parameters() if ".lora_A" in name}
    assert received == base.sites.keys()
    if base.family.kohya:
        tensors = kohya_keys(adapter, base.sites, base.family)
        modules = {base.family.kohya.fused_part(name).module.replace(".", "_") for name in base.sites}
        assert {key.removeprefix("lora_unet_").partition(".")[0] for key in tensors} == modules


@pytest.mark.integration
def test_packed_bases_have_the_same_sites(tiny: TinyPipeline, tmp_path: Path) -> None:
    pack(str(tiny.folder), tmp_path / "packed", "nf4")
    for name in SITE_NAMES:
        plain, packed = (
            Base(folder, sites=name, resolution=tiny.base.resolution) for folder in (tiny.folder, tmp_path / "packed")
        )
        assert plain.sites == packed.sites


@pytest.mark.stress
@pytest.mark.parametrize("base", KNOWN_BASES)
def test_names_of_all_sites_fit_a_message(base: str) -> None:
    """A request names its layers once as adapted and once as trained."""
    sites = find_sites(KNOWN_BASES[base].network(), "all")
    assert 2 * sum(len(name) + 4 for name in sites) < MAX_JSON_CHARS
