"""LoRA files matched with the layers of a base, by their products."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import AntherError
from models.base.base import Base
from models.export import adapter_files
from models.export.base_outline import BaseOutline, outline
from models.export.layouts import diffusers_keys, kohya_keys
from models.export.reading import read_adapter
from models.families.ldm_names import ldm_names
from models.lora.adapter import Adapter
from tests.helpers.adapters import random_adapter
from tests.models.conftest import TinyPipeline


@functools.cache
def outline_of(folder: Path) -> BaseOutline:
    return outline(str(folder))


def check(actual: Adapter, expected: Adapter) -> None:
    assert list(actual) == list(expected)
    for name, (a, b) in expected.items():
        torch.testing.assert_close(actual[name].b @ actual[name].a, b @ a, rtol=1e-6, atol=1e-6)
    assert len({len(factors.a) for factors in actual.values()}) == 1


def test_outline_equals_the_loaded_base(tiny: TinyPipeline) -> None:
    loaded = Base(tiny.folder, sites="all", resolution=tiny.base.resolution)
    read = outline_of(tiny.folder)
    assert list(read.sites.items()) == list(loaded.sites.items())
    assert (read.hash, read.family, read.prediction) == (loaded.hash, loaded.family, loaded.prediction)
    described = [{**adapter_files.describe(base, "shared"), "modelspec.resolution": ""} for base in (read, loaded)]
    assert described[0] == described[1]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_own_exports_of_every_layer(layout: str, tiny: TinyPipeline, tmp_path: Path) -> None:
    base = outline_of(tiny.folder)
    if layout == "kohya" and base.family.kohya is None:
        pytest.skip("no tool reads it")
    adapter = random_adapter(base.sites, {name: 1 + number % 3 for number, name in enumerate(base.sites)})
    adapter_files.write(tmp_path, "a", adapter, base, "personal")
    read = read_adapter(tmp_path / ("a.safetensors" if layout == "diffusers" else "a.kohya.safetensors"), base)
    check(read.adapter, adapter)
    assert (read.contents, read.notes) == ("personal", ())


def renamed(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "b.safetensors")
    return folder / "b.safetensors"


def test_kohya_files_with_original_unet_names(tiny: TinyPipeline, tmp_path: Path) -> None:
    """The usual form of SDXL's; the names are checked against diffusers' converter below."""
    base = outline_of(tiny.folder)
    if base.family.network != "unet":
        pytest.skip("names of UNets")
    originals = ldm_names(base.sites, base.config["layers_per_block"])
    assert originals.keys() == base.sites.keys()
    adapter = random_adapter(base.sites, 2)
    names = {f"lora_unet_{n.replace('.', '_')}": f"lora_unet_{o.replace('.', '_')}" for n, o in originals.items()}
    tensors = {
        f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": tensor * (0.5 if key.endswith("alpha") else 1)
        for key, tensor in kohya_keys(adapter, base.sites, base.family).items()
    }
    halved = {name: factors._replace(b=factors.b / 2) for name, factors in adapter.items()}
    check(read_adapter(renamed(tmp_path, tensors), base).adapter, halved)


def test_ldm_names_match_diffusers_converter(tiny: TinyPipeline) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    base = outline_of(tiny.folder)
    if tiny.name not in ("stable_diffusion", "stable_diffusion_2", "sdxl"):
        pytest.skip("the converter knows published UNets only")
    originals = ldm_names(base.sites, base.config["layers_per_block"])
    numbers = {name: torch.tensor([float(index)]) for index, name in enumerate(base.sites)}
    checkpoint = {
        f"model.diffusion_model.{originals[name]}.{kind}": number for name, number in numbers.items() for kind in KINDS
    }
    config = {"addition_embed_type": "text_time" if tiny.name == "sdxl" else None, **base.config}
    config |= {"class_embed_type": None}
    converted = convert_ldm_unet_checkpoint(checkpoint, config)
    for name, number in numbers.items():
        assert torch.equal(converted[f"{name}.weight"], number), name


KINDS = ("weight", "bias")


def test_further_prefixes(tiny: TinyPipeline, tmp_path: Path) -> None:
    base = outline_of(tiny.folder)
    adapter = random_adapter(base.sites, 1)
    keys = diffusers_keys(adapter, base.sites, base.family)
    for prefix in ("", "base_model.model.", f"{base.family.network}.base_model.model."):
        tensors = {prefix + key.partition(".")[2]: tensor for key, tensor in keys.items()}
        check(read_adapter(renamed(tmp_path, tensors), base).adapter, adapter)


def test_attention_processors_of_old_diffusers(tiny: TinyPipeline, tmp_path: Path) -> None:
    base = outline_of(tiny.folder)
    if tiny.name != "stable_diffusion":
        pytest.skip("of SD 1")
    site = next(name for name in base.sites if name.endswith("attn1.to_out.0"))
    adapter = random_adapter({site: base.sites[site]}, 2)
    stem = f"unet.{site.removesuffix('.to_out.0')}.processor.to_out_lora"
    tensors = {f"{stem}.down.weight": adapter[site].a, f"{stem}.up.weight": adapter[site].b}
    check(read_adapter(renamed(tmp_path, tensors), base).adapter, adapter)


class TestRefusals:
    @pytest.fixture
    def base(self, tiny: TinyPipeline) -> BaseOutline:
        if tiny.name not in ("stable_diffusion", "flux"):
            pytest.skip("one of each kind")
        return outline_of(tiny.folder)

    def refuse(self, tensors: dict[str, Tensor], base: BaseOutline, folder: Path, message: str) -> None:
        file = renamed(folder, tensors)
        with pytest.raises(AntherError, match=message) as caught:
            read_adapter(file, base)
        assert str(caught.value).startswith(f"{file}: ")

    def test_unknown_layer(self, base: BaseOutline, tmp_path: Path) -> None:
        keys = diffusers_keys(random_adapter(base.sites, 1), base.sites, base.family)
        keys |= {f"unet.new.lora_{each}.weight": torch.ones(1, 1) for each in "AB"}
        self.refuse(keys, base, tmp_path, rf"1 of its {len(base.sites) + 1} layers are not in this .* unet\.new: name")

    def test_shapes(self, base: BaseOutline, tmp_path: Path) -> None:
        name, site = next(
            (name, site) for name, site in base.sites.items() if name.endswith("attn.to_q") or "attn1" in name
        )
        wider = {name: site._replace(inputs=site.inputs + 1)}
        keys = diffusers_keys(random_adapter(wider, 2), wider, base.family)
        self.refuse(keys, base, tmp_path, f"has {site.inputs} inputs and {site.outputs} outputs")

    def test_twice(self, base: BaseOutline, tmp_path: Path) -> None:
        if base.family.network != "unet":
            return
        adapter = random_adapter(base.sites, 1)
        both = diffusers_keys(adapter, base.sites, base.family) | kohya_keys(adapter, base.sites, base.family)
        file = renamed(tmp_path, both)
        with pytest.raises(AntherError, match="twice"):
            read_adapter(file, base)

    def test_another_base_of_anther(self, base: BaseOutline, tmp_path: Path) -> None:
        adapter = random_adapter(base.sites, 1)
        adapter_files.write(tmp_path, "a", adapter, base, "shared")
        file = tmp_path / "a.safetensors"
        save_file(load_file(file), file, {"anther_base": "f" * 64})
        with pytest.raises(AntherError, match="belongs to base ffff"):
            read_adapter(file, base)
        check(read_adapter(file, base, any_base=True).adapter, adapter)


def test_text_encoder_parts_are_noted(tiny: TinyPipeline, tmp_path: Path) -> None:
    base = outline_of(tiny.folder)
    adapter = random_adapter(base.sites, 1)
    keys = diffusers_keys(adapter, base.sites, base.family)
    keys |= {f"text_encoder.q.lora_{each}.weight": torch.ones(1, 1) for each in "AB"}
    read = read_adapter(renamed(tmp_path, keys), base)
    check(read.adapter, adapter)
    assert read.notes == ("ignored 2 tensors of text encoders: only the network is adapted",)
