"""Published bases at full size with random weights, and one private step on one picture.

The cost of a step doesn't depend on the values of the weights, so nothing is downloaded. Layers use their default
initialization.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.lib.workloads import RANK, TOKENS
from models.diffusion.denoiser import Denoiser
from models.families.family import pack
from models.families.known import BaseSpec
from models.families.pixart import PIXART
from models.lora.adapter import Adapter, Factors, Sites, init_adapter
from privacy.noise import SimulatedNoise
from training.jobs import DPSGD, Examples, TrainJob

_SHARD = 1 << 28  # bytes of weights in memory at once, in addition to the largest layer


class FullBatchNoise(SimulatedNoise):
    """Reproducible noise, and batches of all pictures."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.arange(size)


def write_base(base: BaseSpec, folder: Path) -> None:
    """Write a pipeline folder with only the network, in several shards as in large published pipelines."""
    network, part = base.network(), folder / base.family.network
    network.save_config(part)  # type: ignore[operator] # of diffusers
    index = {"_class_name": base.family.pipeline, base.family.network: ["diffusers", base.family.kind]}
    (folder / "model_index.json").write_text(json.dumps(index))
    torch.manual_seed(0)
    shard_of: dict[str, str] = {}
    for number, shard in enumerate(_shards(network)):
        file = f"diffusion_pytorch_model-{number:05d}.safetensors"
        save_file(shard, part / file)
        shard_of |= dict.fromkeys(shard, file)
    index_file = part / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))


def _shards(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in _materialize(network):
        shard[name] = tensor
        if sum(value.nbytes for value in shard.values()) > _SHARD:
            yield shard
            shard = {}
    yield shard


def _materialize(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Materialize and yield the tensors of a network on the meta device, layer by layer."""
    for name, layer in network.named_modules():
        own_parameters = dict(layer.named_parameters(name, recurse=False))
        if not own_parameters:
            continue
        layer.to_empty(device="cpu", recurse=False)
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        else:
            for parameter in layer.parameters(recurse=False):  # scale-shift tables
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        for key, parameter in layer.named_parameters(name, recurse=False):
            yield key, parameter.detach()
        layer.to("meta")


def private_step_job(base: BaseSpec, denoiser: Denoiser, side: int) -> TrainJob:
    """Create a job of one private step on one picture.

    Args:
        base: the published base.
        denoiser: its network with adapter sites.
        side: side length of the latents.
    """
    generator = torch.Generator().manual_seed(0)
    config: Any = denoiser.network.config
    channels = base.family.latents(config).channels
    latents = torch.randn(1, channels, side, side, generator=generator)
    context = torch.randn(*base.family.context(base.full_config()), generator=generator)
    if base.family is PIXART:  # the caption fills a part of the rows, which the mask marks
        context = pack(context[:-1], (torch.arange(len(context) - 1) < TOKENS).float())
    return TrainJob(
        client="one",
        round=0,
        purpose="shared",
        seed=0,
        examples=Examples(latents, context[None]),
        start=nonzero_adapter(denoiser.sites),
        steps=1,
        batch_size=1,
        learning_rate=1e-3,
        names=("one",),
        privacy=DPSGD(noise_multiplier=1.0, clip=0.01, sampling_rate=1.0),
        noise=FullBatchNoise(seed=0, client="one", round=0, purpose="shared"),
    )


def nonzero_adapter(sites: Sites) -> Adapter:
    """Return an adapter whose B is not zero, because A has no gradient otherwise."""
    generator = torch.Generator().manual_seed(1)
    fresh = init_adapter(sites, RANK, seed=0)
    return {name: Factors(a, torch.randn(b.shape, generator=generator) * 0.02) for name, (a, b) in fresh.items()}
