"""Every family end to end, on a tiny pipeline of diffusers' classes: load, train, sample, export, load in diffusers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import AntherError
from models.base.base import Base
from models.base.pack import pack
from models.diffusion.denoiser import call_unet
from models.diffusion.objective import add_noise, per_example_loss, target
from models.diffusion.sampling import sample
from models.export.layouts import export, kohya_keys
from models.families.checkpoint import recognize
from models.lora.adapter import Adapter, init_adapter
from models.lora.batched_lora import BatchedFactors, stack_adapters, to_device
from privacy.noise import SimulatedNoise
from tests.helpers.adapters import random_adapter
from tests.helpers.samples import sampled
from tests.models.conftest import TinyPipeline
from training.cohort import train
from training.jobs import DPSGD, Examples, TrainedAdapter, TrainJob

CAPTIONS = ["a red fox", "two fishes 7", "fox"]


@pytest.fixture(scope="module")
def examples(tiny: TinyPipeline) -> Examples:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (20, 24, 3), np.uint8) for _ in CAPTIONS]
    return Examples(tiny.base.encode_images(pictures), tiny.base.encode_captions(CAPTIONS))


def job(base: Base, examples: Examples, **changes: Any) -> TrainJob:
    return TrainJob(
        client="ada",
        round=1,
        purpose="shared",
        seed=0,
        examples=examples,
        start=init_adapter(base.sites, 2, seed=0),
        steps=3,
        batch_size=2,
        learning_rate=1e-2,
        **changes,
    )


@pytest.mark.integration
def test_trains_with_and_without_privacy(tiny: TinyPipeline, examples: Examples) -> None:
    privacy = DPSGD(noise_multiplier=0.5, clip=0.1, sampling_rate=0.7, draws=2)
    noise = SimulatedNoise(seed=3, client="ada", round=1, purpose="shared")
    jobs = [
        job(tiny.base, examples),
        job(tiny.base, examples, privacy=privacy, noise=noise, names=tuple(CAPTIONS)),
    ]
    for expected, outcome in zip(jobs, train(tiny.base, jobs, memory=2**29, timesteps=2), strict=True):
        assert isinstance(outcome, TrainedAdapter), outcome
        assert np.isfinite(outcome.loss)
        assert outcome.adapter.keys() == expected.start.keys() == tiny.base.sites.keys()
        assert any(factors.b.abs().max() > 0 for factors in outcome.adapter.values())


def adapter(base: Base) -> Adapter:
    return random_adapter(base.sites, 2, seed=1)


def sample_latents(
    tiny: TinyPipeline, adapted: Adapter, noise: torch.Tensor, steps: int, guidance: float
) -> torch.Tensor:
    context, null, strength = tiny.base.encode_guidance(CAPTIONS, guidance)
    with tiny.base.use_adapters([stack_adapters(tiny.base.sites, [adapted])]) as denoise:
        return sample(
            "ddim", denoise, tiny.base.schedule, [noise], context, steps=steps, guidance=strength, null_context=null
        )


def load_adapter(pipeline: Any, file: Path) -> None:
    """Load an adapter in diffusers; PixArt has no loader there, so peft, which the others use, reads its file."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(file)
        return
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    sites = [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=sites), pipeline.transformer)
    assert not set_peft_model_state_dict(pipeline.transformer, tensors).unexpected_keys


@pytest.mark.integration
@pytest.mark.parametrize("guidance", sampled([1.0, 2.5], [2.5]))
def test_export_samples_equally_in_diffusers(
    tiny: TinyPipeline, guidance: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To 1e-3 of the largest element, after four steps in float32."""
    adapted, file = adapter(tiny.base), tmp_path / "adapter.safetensors"
    export(adapted, file, family=tiny.base.family, sites=tiny.base.sites, metadata=tiny.base.provenance)
    pipeline = tiny.pipeline()
    noise = torch.randn(len(CAPTIONS), *tiny.base.shape, generator=torch.Generator().manual_seed(0))
    plain = tiny.sample(pipeline, CAPTIONS, noise, 4, guidance)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "diffusers"):
        load_adapter(pipeline, file)
    messages = [record.getMessage() for record in caplog.records]
    assert [line for line in messages if not line.startswith("No LoRA keys associated to CLIPText")] == []
    network = getattr(pipeline, tiny.base.family.network)
    received = {name for name, _ in network.named_parameters() if ".lora_" in name}
    assert len(received) == len(load_file(file)) == 2 * len(tiny.base.sites)
    reference = tiny.sample(pipeline, CAPTIONS, noise, 4, guidance)
    actual = sample_latents(tiny, adapted, noise, 4, guidance)
    assert (actual - reference).abs().max() <= 1e-3 * reference.abs().max()
    assert (plain - reference).abs().max() > 1e-2 * reference.abs().max()
    assert np.abs(tiny.base.decode(actual).astype(int) - pictures(pipeline, reference)).max() <= 1


def pictures(pipeline: Any, latents: torch.Tensor) -> np.ndarray:
    """Decode with diffusers' image processor."""
    config = pipeline.vae.config
    pixels = pipeline.vae.decode(latents / config.scaling_factor + (config.get("shift_factor") or 0.0)).sample
    result: np.ndarray = (pipeline.image_processor.postprocess(pixels.detach(), output_type="np") * 255).round()
    return result.astype(int)


@pytest.mark.integration
def test_kohya_keys(tiny: TinyPipeline, tmp_path: Path) -> None:
    """diffusers reads those of UNets; for Flux only at full width (see test_kohya), and none for SD3."""
    adapted, family = adapter(tiny.base), tiny.base.family
    if family.kohya is None:
        with pytest.raises(AntherError, match="layout=diffusers"):
            kohya_keys(adapted, tiny.base.sites, family)
        return
    if family.network == "transformer":
        return
    file = tmp_path / "adapter.safetensors"
    export(adapted, file, family=family, sites=tiny.base.sites, layout="kohya")
    stems = {key.split(".")[0] for key in load_file(file)}
    assert stems == {"lora_unet_" + name.replace(".", "_") for name in tiny.base.sites}
    pipeline = tiny.pipeline()
    pipeline.load_lora_weights(file)
    noise = torch.randn(len(CAPTIONS), *tiny.base.shape, generator=torch.Generator().manual_seed(0))
    reference = tiny.sample(pipeline, CAPTIONS, noise, 1, 1.0)
    assert (sample_latents(tiny, adapted, noise, 1, 1.0) - reference).abs().max() <= 1e-3 * reference.abs().max()


def test_examples_are_independent(tiny: TinyPipeline, examples: Examples) -> None:
    """The loss of one example has zero gradient for other examples and slots; DP and cohorts depend on it."""
    base = tiny.base
    adapters = [random_adapter(base.sites, 2, seed) for seed in range(3)]
    stacks = {
        name: BatchedFactors(stack.a.requires_grad_(), stack.b.requires_grad_())
        for name, stack in stack_adapters(base.sites, adapters).items()
    }
    factors = [factor for stack in stacks.values() for factor in stack]
    x0, context = examples.latents.clone().requires_grad_(), examples.context.clone().requires_grad_()
    noise, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500, 990])
    with base.use_adapters([stacks]) as denoise:
        output = denoise(add_noise(base.schedule, x0, noise, t), base.schedule.times[t], context)
        losses = per_example_loss(output, target(base.schedule, x0, noise, t))
        result = torch.autograd.grad(losses[1], [x0, context, *factors])
    for gradient in result:
        assert gradient[1].isfinite().all()
        assert not gradient[[0, 2]].any()
    assert all(gradient[1].any() for gradient in result[:2])
    assert (
        sum(bool(gradient[1].any()) for gradient in result[2:]) >= len(factors) - 8
    )  # the last block has no text output


@pytest.mark.integration
def test_adapters_equal_merged_weights(tiny: TinyPipeline, examples: Examples) -> None:
    """All linear and convolution layers at once, each example with its own adapter."""
    base = Base(tiny.folder, sites=".*", resolution=tiny.base.resolution)
    adapters = [random_adapter(base.sites, 2, seed) for seed in range(3)]
    times = base.schedule.times[[10, 500, 990]]
    with base.use_adapters([stack_adapters(base.sites, adapters)]) as denoise, torch.no_grad():
        result = denoise(examples.latents, times, examples.context)
    for i, adapted in enumerate(adapters):
        plain = recognize(tiny.folder).load(base.family.network)
        with torch.no_grad():
            for name, (a, b) in adapted.items():
                weight = plain.get_submodule(name).weight
                weight += (b @ a).view_as(weight)
            row = slice(i, i + 1)
            expected = base.family.forward(plain, examples.latents[row], times[row], examples.context[row])
        assert (result[row] - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.stress
def test_forward_is_one_graph(tiny: TinyPipeline, examples: Examples) -> None:
    """Nothing leaves the device or depends on values, also at another resolution."""
    if tiny.base.family.forward is call_unet:
        pytest.skip("compiled in test_denoiser")
    torch._dynamo.reset()
    base = tiny.base
    whole = torch.compile(base.family.forward, backend="eager", fullgraph=True, dynamic=False)
    inputs = examples.latents[:1].repeat(1, 1, 2, 2), base.schedule.times[[500]], examples.context[:1]
    with torch.no_grad():
        torch.testing.assert_close(whole(base.network, *inputs), base.family.forward(base.network, *inputs))


@pytest.mark.integration
def test_packed_pipeline_matches(tiny: TinyPipeline, examples: Examples, tmp_path: Path) -> None:
    pack(str(tiny.folder), tmp_path / "packed", "mixed")
    outputs = []
    for base in (
        Base(tiny.folder, resolution=tiny.base.resolution, weights="mixed"),
        Base(tmp_path / "packed", resolution=tiny.base.resolution),
    ):
        with base.use_adapters([]) as denoise, torch.no_grad():
            outputs.append(denoise(examples.latents, torch.tensor([3, 500, 900]), examples.context))
    assert torch.equal(*outputs)


def test_packed_caption_shape(tiny: TinyPipeline, examples: Examples) -> None:
    """Except that the tiny CLIP has 8 tokens instead of 77."""
    clip = tiny.base.family.name in ("stable-diffusion", "sdxl", "sd3")
    rows, width = examples.context.shape[1:]
    assert tiny.base.family.context(tiny.base.network.config) == (rows + (77 - 8) * clip, width)


def test_captions_are_encoded_independently(tiny: TinyPipeline) -> None:
    together = tiny.base.encode_captions([*CAPTIONS, None, "fox"])
    assert torch.equal(together[2], together[4])
    assert not torch.equal(together[2], together[1])
    assert torch.equal(tiny.base.encode_captions(["fox"])[0], together[2])
    assert torch.equal(tiny.base.encode_captions([None])[0], together[3])


@pytest.mark.integration
@pytest.mark.parametrize("options", [{"weights": "int8"}, {"compute": "bf16"}])
def test_runs_quantized(tiny: TinyPipeline, examples: Examples, options: dict[str, str]) -> None:
    small = Base(tiny.folder, resolution=tiny.base.resolution, **options)
    batched, outputs = stack_adapters(small.sites, [adapter(small)]), []
    for base in (small, tiny.base):
        with base.use_adapters([to_device(batched, base.like)]) as denoise, torch.no_grad():
            outputs.append(denoise(examples.latents, base.schedule.times[[10, 500, 990]], examples.context).float())
    assert 0 < (outputs[0] - outputs[1]).norm() < 0.2 * outputs[1].norm()
