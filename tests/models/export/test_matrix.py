"""Every family, layout and content of exports: equal outputs in diffusers, and equal products in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.export import adapter_files
from models.export.base_outline import outline
from models.export.reading import read_adapter
from models.lora.adapter import concatenate
from models.lora.batched_lora import stack_adapters
from tests.helpers.adapters import random_adapter
from tests.models.conftest import TinyPipeline


def loaded(tiny: TinyPipeline, file: Path, rank: int) -> Any:
    """Return the network of diffusers' pipeline with the adapter; PixArt has no loader, so peft reads its file."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    pipeline = tiny.pipeline()
    network = getattr(pipeline, tiny.base.family.network)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(file)
        return network
    tensors = {key.partition(".")[2]: tensor for key, tensor in load_file(file).items()}
    sites = [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=sites), network)
    assert not set_peft_model_state_dict(network, tensors).unexpected_keys
    return network


@pytest.mark.integration
def test_outputs_and_products(tiny: TinyPipeline, tmp_path: Path) -> None:
    base, described = tiny.base, outline(str(tiny.folder))
    shared, personal = random_adapter(base.sites, 2, 1), random_adapter(base.sites, 1, 2)
    x = torch.randn(1, *base.shape, generator=torch.Generator().manual_seed(0))
    t, context = base.schedule.times[[500]], base.encode_captions(["fox"])
    for contents, parts in (
        ("shared", [shared]),
        ("personal", [personal]),
        ("shared+personal", [shared, personal]),
    ):
        adapter = concatenate(parts)
        adapter_files.write(tmp_path, contents, adapter, base, contents)
        for file in sorted(tmp_path.glob(f"{contents}.*")):
            read = read_adapter(file, described)
            assert read.contents == contents
            for name, (a, b) in adapter.items():
                product = b.double() @ a.double()
                difference = read.adapter[name].b.double() @ read.adapter[name].a.double() - product
                assert difference.norm() <= 1e-6 * product.norm()
            if ".kohya." in file.name and base.family.network == "transformer":
                continue  # diffusers reads these for Flux at its published width only
            with torch.no_grad(), base.use_adapters([stack_adapters(base.sites, [adapter])]) as denoise:
                expected = denoise(x, t, context)
                network = loaded(tiny, file, len(adapter[next(iter(adapter))].a))
                output = base.family.forward(network, x, t, context)
            assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()
