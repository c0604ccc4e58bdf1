"""The base's own code against the pipeline it was loaded from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from conf.errors import AntherError
from models import assets
from models.adapter import Adapter, Factors, concatenate, initial, rank
from models.base import Base, load
from models.export import export, kohya_keys
from models.sampling import ddim
from models.slots import stack_adapters
from tests.tiny import ATTENTION, save_pipeline


def live(base: Base, rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = initial(base.sites, rank, seed)
    return {name: Factors(f.a, torch.randn(f.b.shape, generator=generator)) for name, f in adapter.items()}


def inputs(base: Base, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, *base.shape, generator=generator)
    return x, torch.arange(count) * 300, torch.randn(count, 8, 16, generator=generator)


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_without_adapters_it_is_the_pipelines_unet(base: Base, pipeline: StableDiffusionPipeline) -> None:
    x, t, context = inputs(base)
    found = base.denoise(x, t, context, [], torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found, pipeline.unet(x, t, encoder_hidden_states=context).sample)


def test_latents_and_captions_are_the_pipelines(base: Base, pipeline: StableDiffusionPipeline) -> None:
    images = [np.random.randint(0, 255, (16, 16), np.uint8) for _ in range(2)]
    pixels = torch.tensor(np.stack(images)[:, None] / 127.5 - 1, dtype=torch.float32)
    wanted = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(base.encode_images(images), wanted)
    captions = ["digit 7", "capital letter a", "digit 7"]
    wanted, _ = pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(base.encode_captions(captions), wanted)


def test_pictures_of_any_size_and_kind_become_latents(base: Base, tmp_path: Path) -> None:
    images = [np.zeros((9, 33), np.uint8), np.zeros((64, 64, 3), np.uint8)]
    assert base.encode_images(images).shape == (2, *base.shape)
    colour = Base(save_pipeline(tmp_path, channels=3), sites=ATTENTION)
    latents = colour.encode_images(images)
    assert latents.shape == (2, *colour.shape)
    assert colour.decode(latents).shape == (2, 16, 16, 3)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_is_that_of_diffusers(guidance: float, prediction: str, tmp_path: Path) -> None:
    base = Base(save_pipeline(tmp_path, prediction=prediction), sites=ATTENTION)
    x, _, context = inputs(base)
    null, slots = context[0] * 0.3, torch.zeros(3, dtype=torch.long)

    def denoise(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return base.denoise(x, t, context, [], slots)

    found = ddim(denoise, base.schedule, x, context, steps=4, guidance=guidance, null_context=null)
    scheduler = DDIMScheduler.from_pretrained(base.folder / "scheduler", timestep_spacing="linspace")
    scheduler.set_timesteps(5)  # ours visits the first four of five evenly spaced times, and ends at the clean picture
    for t, after in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        output = denoise(x, t.expand(3), context)
        plain = denoise(x, t.expand(3), null.expand(3, -1, -1))
        output = plain + guidance * (output - plain)
        step = scheduler.step(output, t, x)
        noise = scheduler.add_noise(torch.zeros_like(x), torch.ones_like(x), t[None])
        signal = scheduler.alphas_cumprod[t].sqrt()
        epsilon = (x - signal * step.pred_original_sample) / noise
        alpha = scheduler.alphas_cumprod[after]
        x = (
            step.pred_original_sample
            if after == 0
            else alpha.sqrt() * step.pred_original_sample + (1 - alpha).sqrt() * epsilon
        )
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_an_export_draws_in_diffusers_what_it_draws_here(
    base: Base, pipeline_folder: Path, tmp_path: Path, layout: str
) -> None:
    adapter = concatenate([live(base, 2, 0), live(base, 3, 1)])
    export(adapter, tmp_path / "adapter.safetensors", layout=layout)
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    x, t, context = inputs(base)
    plain = pipe.unet(x, t, encoder_hidden_states=context).sample
    pipe.load_lora_weights(tmp_path / "adapter.safetensors")
    theirs = pipe.unet(x, t, encoder_hidden_states=context).sample
    ours = base.denoise(x, t, context, [stack_adapters(base.sites, [adapter])], torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, theirs, atol=1e-3)


def test_kohya_alpha_is_the_rank(base: Base) -> None:
    tensors = kohya_keys(live(base, 3, 0))
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {3.0}
    assert rank({}) == 0


def test_an_export_appears_whole(base: Base, tmp_path: Path) -> None:
    export(live(base, 2, 0), tmp_path / "deep" / "a.safetensors", metadata={"base": base.hash})
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.safetensors"]
    assert len(load_file(tmp_path / "deep" / "a.safetensors")) == 2 * len(base.sites)


class TestRefused:
    """Each one clear line."""

    def refuse(self, folder: Path, match: str, sites: str = ATTENTION) -> None:
        with pytest.raises(AntherError, match=match) as refusal:
            Base(folder, sites=sites)
        assert "\n" not in str(refusal.value)

    @pytest.fixture
    def folder(self, pipeline_folder: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))

    def test_missing(self) -> None:
        with pytest.raises(AntherError, match="no such folder"):
            load("/nowhere/at/all", sites=ATTENTION)

    def test_not_a_pipeline(self, tmp_path: Path) -> None:
        self.refuse(tmp_path, "model_index.json")

    def test_another_architecture(self, folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
        self.refuse(folder, "FluxPipeline")

    def test_part_missing(self, folder: Path) -> None:
        shutil.rmtree(folder / "vae")
        self.refuse(folder, "vae is missing")

    def test_truncated_weights(self, folder: Path) -> None:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.refuse(folder, "can't load UNet2DConditionModel")

    def test_pickled_weights(self, folder: Path) -> None:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
        self.refuse(folder, "can't load UNet2DConditionModel")

    def test_no_site(self, folder: Path) -> None:
        self.refuse(folder, "matches no linear layer", sites="nothing")
        self.refuse(folder, "not a regular expression", sites="(")


def test_the_hash_is_of_what_matters(pipeline_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))
    assert assets.digest(copy) == assets.digest(pipeline_folder)
    (copy / "README.md").write_text("a card")
    assert assets.digest(copy) == assets.digest(pipeline_folder)
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
    assert assets.digest(copy) != assets.digest(pipeline_folder)
