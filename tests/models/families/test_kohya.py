"""Kohya's layout: names of sd-scripts, and products placed by diffusers' own converters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import AntherError
from models.base.base import Base
from models.export.adapter_files import CONTENTS, describe, write
from models.export.layouts import diffusers_keys, export, kohya_keys
from models.families.flux import FLUX
from models.families.kohya import FusedPart
from models.families.sd3 import SD3
from models.lora.adapter import Adapter, Site, Sites
from tests.helpers.adapters import random_adapter
from tests.models.conftest import TinyPipeline

_SD3_BLOCK = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
SD3_MODULES = [  # tiny model: two attentions in the first block, no text output in the last
    *(f"joint_blocks.0.{side}.{module}" for side in ("x_block", "context_block") for module in _SD3_BLOCK),
    "joint_blocks.0.x_block.attn2.qkv",
    "joint_blocks.0.x_block.attn2.proj",
    *(f"joint_blocks.1.x_block.{module}" for module in _SD3_BLOCK),
    "joint_blocks.1.context_block.attn.qkv",
    "joint_blocks.1.context_block.adaLN_modulation.1",
    "x_embedder.proj",
    "context_embedder",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "y_embedder.mlp.0",
    "y_embedder.mlp.2",
    "final_layer.adaLN_modulation.1",
    "final_layer.linear",
]
FLUX_MODULES = [
    *(
        f"double_blocks.0.{side}_{module}"
        for side in ("img", "txt")
        for module in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")
    ),
    "single_blocks.0.linear1",
    "single_blocks.0.linear2",
    "single_blocks.0.modulation.lin",
    "img_in",
    "txt_in",
    *(f"{part}_in.{end}_layer" for part in ("time", "vector", "guidance") for end in ("in", "out")),
    "final_layer.adaLN_modulation.1",
    "final_layer.linear",
]


def products(keys: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ΔW [out, in] of each stem, scaled by its α."""
    result = {}
    for name, down in keys.items():
        if not name.endswith((".lora_down.weight", ".lora_A.weight")):
            continue
        stem = name.rpartition(".lora_")[0]
        up = keys.get(f"{stem}.lora_up.weight", keys.get(f"{stem}.lora_B.weight"))
        assert up is not None
        scale = float(keys.get(f"{stem}.alpha", torch.tensor(float(len(down))))) / len(down)
        result[stem] = scale * up.flatten(1).double() @ down.flatten(1).double()
    return result


def as_checkpoint(keys: dict[str, Tensor], modules: list[str]) -> dict[str, Tensor]:
    """Return products as weights of an original checkpoint, with biases of matching size."""
    result = products(keys)
    checkpoint: dict[str, Tensor] = {}
    assert {f"lora_unet_{module.replace('.', '_')}" for module in modules} == result.keys()
    for module in modules:
        weight = result[f"lora_unet_{module.replace('.', '_')}"]
        checkpoint |= {f"{module}.weight": weight, f"{module}.bias": torch.zeros(len(weight))}
    return checkpoint


def check(converted: dict[str, Tensor], adapter: Adapter) -> None:
    """Compare each layer's product with its adapter's, to float32 accuracy of the factors."""
    for name, (a, b) in adapter.items():
        torch.testing.assert_close(converted[f"{name}.weight"], b.double() @ a.double(), rtol=0, atol=1e-12)


def base_of(tiny: TinyPipeline, name: str) -> Base:
    if tiny.name != name:
        pytest.skip(f"of {name}")
    return Base(tiny.folder, sites=".*", resolution=tiny.base.resolution)


def test_sd3_layers_match_original(tiny: TinyPipeline) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    base = base_of(tiny, "sd3")
    adapter = random_adapter(base.sites, 2)
    checkpoint = as_checkpoint(kohya_keys(adapter, base.sites, SD3), SD3_MODULES)
    blank = torch.zeros(0)
    checkpoint["pos_embed"] = blank
    for block in ("joint_blocks.0", "joint_blocks.1"):
        for part in ("x_block.attn", "context_block.attn", "x_block.attn2"):
            checkpoint |= {f"{block}.{part}.ln_{each}.weight": blank for each in "qk"}
    del checkpoint["joint_blocks.1.x_block.attn2.ln_q.weight"], checkpoint["joint_blocks.1.x_block.attn2.ln_k.weight"]
    check(convert_sd3_transformer_checkpoint_to_diffusers(checkpoint), adapter)


_FF = {"0.proj": 4, "2": 1}


def flux_sites() -> Sites:
    """Return one block of each kind with the real output sizes, which diffusers' converter requires, and four
    inputs."""
    wide = 3072
    joint = {
        f"transformer_blocks.0.{name}": Site(4, height * wide)
        for name, height in {
            **{f"attn.{each}": 1 for each in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
            **{f"attn.add_{each}_proj": 1 for each in "qkv"},
            **{f"{ff}.net.{part}": height for ff in ("ff", "ff_context") for part, height in _FF.items()},
            "norm1.linear": 6,
            "norm1_context.linear": 6,
        }.items()
    }
    heights = {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4, "proj_out": 1, "norm.linear": 3}
    single = {f"single_transformer_blocks.0.{name}": Site(4, height * wide) for name, height in heights.items()}
    embedders = {
        f"time_text_embed.{name}_embedder.linear_{i}": Site(4, 8)
        for name in ("timestep", "text", "guidance")
        for i in (1, 2)
    }
    ends = {
        "x_embedder": Site(4, 8),
        "context_embedder": Site(4, 8),
        "proj_out": Site(4, 8),
        "norm_out.linear": Site(4, 8),
    }
    return joint | single | embedders | ends


def test_flux_layers_match_original() -> None:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    adapter = random_adapter(flux_sites(), 2)
    checkpoint = as_checkpoint(kohya_keys(adapter, flux_sites(), FLUX), FLUX_MODULES)
    for norms in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        checkpoint |= {f"{norms}.norm.{each}_norm.scale": torch.zeros(0) for each in ("query", "key")}
    check(convert_flux_transformer_checkpoint_to_diffusers(checkpoint), adapter)


def test_tiny_flux_names_are_mapped(tiny: TinyPipeline) -> None:
    base = base_of(tiny, "flux")
    keys = products(kohya_keys(random_adapter(base.sites, 1), base.sites, FLUX))
    assert keys.keys() == {f"lora_unet_{module.replace('.', '_')}" for module in FLUX_MODULES}


@pytest.mark.parametrize("some", [None, "to_q", "attn"])
def test_diffusers_reads_flux_kohya_files(some: str | None) -> None:
    """Also if parts of a fused layer have no adapter."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    sites = {name: site for name, site in flux_sites().items() if some is None or some in name}
    adapter = random_adapter(sites, 2)
    back = products(_convert_kohya_flux_lora_to_diffusers(kohya_keys(adapter, sites, FLUX)))
    back = {name.removeprefix("transformer."): product for name, product in back.items()}
    for name, (a, b) in adapter.items():
        torch.testing.assert_close(back.pop(name), b.double() @ a.double(), rtol=0, atol=1e-6)
    assert all(not product.any() for product in back.values())


def test_padding_ranks_keeps_products(tiny: TinyPipeline) -> None:
    base = base_of(tiny, "sd3")
    ranks = {name: 1 + i % 3 for i, name in enumerate(base.sites)}
    adapter = random_adapter(base.sites, ranks)
    result = products(kohya_keys(adapter, base.sites, SD3))["lora_unet_joint_blocks_0_x_block_attn_qkv"]
    for i, each in enumerate("qkv"):
        a, b = adapter[f"transformer_blocks.0.attn.to_{each}"]
        torch.testing.assert_close(result[16 * i : 16 * (i + 1)], b.double() @ a.double(), rtol=0, atol=1e-12)


def test_unmapped_layer_is_refused() -> None:
    with pytest.raises(AntherError, match=r"^new\.layer: has no name in kohya's layout"):
        kohya_keys(random_adapter({"new.layer": Site(2, 2)}, 1), {"new.layer": Site(2, 2)}, FLUX)


def test_layers_ignored_by_sd_scripts_are_recorded(tiny: TinyPipeline) -> None:
    base = Base(tiny.folder, sites=".*", resolution=tiny.base.resolution)
    ignored = describe(base, "shared").get("anther_ignored_by_sd_scripts", "").split()
    if base.family.kohya is None:
        assert ignored == []
        return
    expected = {
        "sdxl": {f"{part}_embedding.linear_{i}" for part in ("time", "add") for i in (1, 2)},
        "stable-diffusion": {"time_embedding.linear_1", "time_embedding.linear_2"},
        "sd3": set(),
        "flux": {"norm_out.linear", "proj_out"},
    }[base.family.name]
    assert set(ignored) == expected | ({"conv_in", "conv_out"} if base.family.network == "unet" else set())
    assert set(ignored) < set(base.sites)
    assert "anther_ignored_by_sd_scripts" not in describe(tiny.base, "shared")


A1111 = {"stable_diffusion": "SD1", "distilled": "SD1", "stable_diffusion_2": "SD2", "sdxl": "SDXL"}


def test_metadata_identifies_the_base(tiny: TinyPipeline, tmp_path: Path) -> None:
    base, file = tiny.base, tmp_path / "a.safetensors"
    for layout in ("diffusers", "kohya") if base.family.kohya else ("diffusers",):
        export(
            random_adapter(base.sites, 2),
            file,
            family=base.family,
            sites=base.sites,
            layout=layout,
            metadata=describe(base, "shared+personal"),
        )
        text = file.read_bytes()
        header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
        metadata = header["__metadata__"]
        assert list(metadata) == sorted(metadata)
        assert metadata["anther_base"] == base.hash
        assert metadata["anther_contents"] == "shared+personal"
        assert metadata["modelspec.description"] == CONTENTS["shared+personal"]
        assert metadata["modelspec.resolution"] == f"{base.resolution}x{base.resolution}"
        assert metadata["modelspec.architecture"].endswith("/lora")
        # as in A1111's network.py
        sdxl = metadata.get("ss_base_model_version", "").startswith("sdxl_")
        version = "SDXL" if sdxl else "SD2" if metadata.get("ss_v2") == "True" else "SD1"
        assert version == A1111.get(tiny.name, "SD1")
        modules = {"sd3": "networks.lora_sd3", "flux": "networks.lora_flux"}
        if layout == "diffusers":  # which no module of sd-scripts reads
            assert not {"ss_network_module", "ss_network_dim", "ss_network_alpha"} & metadata.keys()
        else:
            assert metadata["ss_network_module"] == modules.get(base.family.name, "networks.lora")
            assert metadata["ss_network_dim"] == metadata["ss_network_alpha"]
            assert metadata["ss_network_dim"] == ("2" if base.family.network == "unet" else "Dynamic")


def test_export_is_reproducible(tiny: TinyPipeline, tmp_path: Path) -> None:
    base, contents = tiny.base, set()
    for name in ("a", "b", "c"):
        export(
            random_adapter(base.sites, 1),
            tmp_path / name,
            family=base.family,
            sites=base.sites,
            metadata=describe(base, "shared"),
        )
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1
    assert (
        load_file(tmp_path / "a").keys()
        == diffusers_keys(random_adapter(base.sites, 1), base.sites, base.family).keys()
    )


def test_fused_part_defaults_to_whole_module() -> None:
    assert SD3.kohya is not None
    assert SD3.kohya.fused_part("context_embedder") == FusedPart("context_embedder")
    assert SD3.kohya.fused_part("transformer_blocks.11.attn.add_k_proj") == FusedPart(
        "joint_blocks.11.context_block.attn.qkv", 1, (1, 1, 1)
    )


def test_each_layout_has_its_own_file(tiny: TinyPipeline, tmp_path: Path) -> None:
    write(tmp_path, "a.b", random_adapter(tiny.base.sites, 1), tiny.base, "shared")
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"a.b.safetensors"} | ({"a.b.kohya.safetensors"} if tiny.base.family.kohya else set())
