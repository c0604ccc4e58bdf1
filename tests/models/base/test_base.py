"""Compare the base with the pipeline that it was loaded from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from bench.lib.tiny import ATTENTION, save_pipeline
from common.errors import AntherError
from models.base.base import Base, load
from models.export.layouts import diffusers_keys, export, kohya_keys
from models.families.checkpoint import Checkpoint, recognize
from models.families.stable_diffusion import STABLE_DIFFUSION
from models.files import assets
from models.lora.adapter import Adapter, Site, concatenate, rank
from models.lora.batched_lora import BatchedAdapter, Layout, stack_adapters
from tests.helpers.adapters import random_adapter

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def run_network(base: Base, x: Tensor, t: Tensor, context: Tensor, adapters: Sequence[BatchedAdapter] = ()) -> Tensor:
    with base.use_adapters(adapters) as denoise, torch.no_grad():
        return denoise(x, t, context)


def inputs(base: Base, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, *base.shape, generator=generator)
    return x, torch.arange(count) * 300, torch.randn(count, 8, 16, generator=generator)


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_without_adapters_equals_the_unet(base: Base, pipeline: StableDiffusionPipeline) -> None:
    x, t, context = inputs(base)
    torch.testing.assert_close(
        run_network(base, x, t, context), pipeline.unet(x, t, encoder_hidden_states=context).sample
    )


def test_encodings_equal_the_pipelines(base: Base, pipeline: StableDiffusionPipeline) -> None:
    images = [np.random.randint(0, 255, (16, 16), np.uint8) for _ in range(2)]
    pixels = torch.tensor(np.stack(images)[:, None] / 127.5 - 1, dtype=torch.float32)
    expected = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(base.encode_images(images), expected)
    captions = ["digit 7", "capital letter a", "digit 7"]
    expected, _ = pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(base.encode_captions(captions), expected)


@pytest.mark.integration
def test_images_are_encoded_independently(base: Base) -> None:
    """Bit-identical by itself, with others, and at any position, in one pass or several."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (16, 16), np.uint8) for _ in range(19)]
    captions = [f"{'abc'[: i % 4]} {i}" for i in range(19)]
    for encode, all_of_them in ((base.encode_images, images), (base.encode_captions, captions)):
        together = encode(all_of_them)
        assert len({tuple(row.flatten().tolist()) for row in together}) == 19
        for row in (0, 3, 15, 16, 18):
            assert torch.equal(encode([all_of_them[row]])[0], together[row])
        order = generator.permutation(19)
        assert torch.equal(encode([all_of_them[row] for row in order]), together[order])
        assert torch.equal(encode(all_of_them[1:]), together[1:])


def test_images_of_any_size_are_encoded(base: Base, tmp_path: Path) -> None:
    images = [np.zeros((9, 33), np.uint8), np.zeros((64, 64, 3), np.uint8)]
    assert base.encode_images(images).shape == (2, *base.shape)
    colour = Base(save_pipeline(tmp_path, channels=3), sites=ATTENTION)
    latents = colour.encode_images(images)
    assert latents.shape == (2, *colour.shape)
    assert colour.decode(latents).shape == (2, 16, 16, 3)


def test_small_vae_replaces_the_bases(tmp_path: Path) -> None:
    """TAESD's class has no distribution, and different names for its sizes."""
    from diffusers import AutoencoderTiny

    folder = save_pipeline(tmp_path, channels=3)
    shutil.rmtree(folder / "vae")
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.7,
        shift_factor=0.2,
    )
    small.save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderTiny"]}))
    base = Base(folder)
    images = [np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8) for seed in range(2)]
    pixels = torch.tensor(np.stack(images).transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32)
    with torch.no_grad():
        latents = (small.encode(pixels).latents - 0.2) * 0.7
        torch.testing.assert_close(base.encode_images(images), latents)
        expected = (small.decode(latents / 0.7 + 0.2).sample + 1) * 127.5
    actual = torch.from_numpy(base.decode(latents)).permute(0, 3, 1, 2)
    assert (actual - expected.clamp(0, 255)).abs().max() <= 0.51


@pytest.mark.parametrize(("resolution", "pictures"), [(16, 16), (64, 16), (128, 4), (512, 1)])
def test_vae_batch_shrinks_with_resolution(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, resolution: int, pictures: int
) -> None:
    seen: list[int] = []
    vae = recognize(pipeline_folder).load("vae")
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda part: (seen.append(len(part)), encode(part[:, :, :16, :16]))[1])
    base = Base(pipeline_folder, resolution=resolution)
    monkeypatch.setattr(Checkpoint, "load", lambda checkpoint, part: vae)  # noqa: ARG005
    base.encode_images([np.zeros((16, 16), np.uint8)] * 3)
    assert set(seen) == {pictures}


def adapted(base: Base) -> Adapter:
    """Create an adapter whose ranks differ between sites."""
    first = random_adapter(base.sites, 2, 0)
    return concatenate([first, random_adapter(base.sites, dict.fromkeys(list(base.sites)[::3], 3), 1)])


@pytest.mark.integration
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("sites", [ATTENTION, r".*(conv[12]|conv_shortcut|samplers\.0\.conv|proj_in)", ".*"])
def test_export_samples_equally_in_diffusers(pipeline_folder: Path, tmp_path: Path, layout: str, sites: str) -> None:
    from diffusers import StableDiffusionPipeline

    base = Base(pipeline_folder, sites=sites)
    adapter = adapted(base)
    export(adapter, tmp_path / "adapter.safetensors", family=base.family, sites=base.sites, layout=layout)
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    x, t, context = inputs(base)
    with torch.no_grad():
        plain = pipe.unet(x, t, encoder_hidden_states=context).sample
        pipe.load_lora_weights(tmp_path / "adapter.safetensors")
        reference = pipe.unet(x, t, encoder_hidden_states=context).sample
    result = run_network(base, x, t, context, [stack_adapters(base.sites, [adapter])])
    torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, reference, atol=1e-3)


@pytest.mark.parametrize("keys", [diffusers_keys, kohya_keys])
def test_exported_product_equals_two_layers(keys: Callable[..., dict[str, Tensor]]) -> None:
    sites = {"down.conv": Site(3 * 3 * 2, 5, (3, 2)), "down.point": Site(3, 5, (1, 1)), "attn.to_q": Site(4, 6)}
    adapter = random_adapter(sites, 2)
    tensors = keys(adapter, sites, STABLE_DIFFUSION)
    downs = [tensor for key, tensor in tensors.items() if key.endswith(("lora_A.weight", "lora_down.weight"))]
    ups = [tensor for key, tensor in tensors.items() if key.endswith(("lora_B.weight", "lora_up.weight"))]
    assert [tensor.shape for tensor in downs] == [(2, 3, 3, 2), (2, 3, 1, 1), (2, 4)]
    assert [tensor.shape for tensor in ups] == [(5, 2, 1, 1), (5, 2, 1, 1), (6, 2)]
    for down, up, (name, factors) in zip(downs, ups, adapter.items(), strict=True):
        weight = factors.b @ factors.a
        if sites[name].kernel:
            x = torch.randn(1, 3, 5, 5)
            expected = F.conv2d(x, weight.view(5, 3, *sites[name].kernel))
            actual = F.conv2d(F.conv2d(x, down), up)
        else:
            x = torch.randn(1, 4)
            expected, actual = F.linear(x, weight), F.linear(F.linear(x, down), up)
        torch.testing.assert_close(actual, expected)


def test_kohya_alpha_equals_rank(base: Base) -> None:
    tensors = kohya_keys(adapted(base), base.sites, base.family)
    ranks = {len(tensor) for key, tensor in tensors.items() if key.endswith("lora_down.weight")}
    assert ranks == {5} == {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert rank({}) == 0


def test_export_is_atomic(base: Base, tmp_path: Path) -> None:
    layout, adapter = Layout(base.sites, 3), random_adapter(base.sites, 3)
    trained = layout.unpack(layout.pack(adapter), adapter)  # its tensors share one storage
    path = tmp_path / "deep" / "a.safetensors"
    export(trained, path, family=base.family, sites=base.sites, metadata={"base": base.hash})
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]
    actual = load_file(path)
    assert len(actual) == 2 * len(base.sites)
    assert all(torch.equal(actual[f"unet.{name}.lora_B.weight"], factors.b) for name, factors in adapter.items())
    with safe_open(path, "pt") as file:
        assert file.metadata()["base"] == base.hash


def test_rank_zero_is_exported(base: Base, tmp_path: Path) -> None:
    export(random_adapter(base.sites, 0), tmp_path / "a.safetensors", family=base.family, sites=base.sites)
    assert {tensor.numel() for tensor in load_file(tmp_path / "a.safetensors").values()} == {0}


class TestBaseErrors:
    """Each error is one clear line."""

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
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KolorsPipeline"}))
        self.refuse(folder, "KolorsPipeline")

    def test_part_missing(self, folder: Path) -> None:
        shutil.rmtree(folder / "vae")
        self.refuse(folder, "vae is missing")

    def test_truncated_weights(self, folder: Path) -> None:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.refuse(folder, "can't load UNet2DConditionModel")

    def test_missing_weights(self, folder: Path) -> None:
        """diffusers would initialize them at random."""
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        del weights["conv_in.bias"]
        save_file(weights, file, {"format": "pt"})
        self.refuse(folder, r"lacks 1 of the weights that config.json names \(conv_in.bias, …\)")

    def test_pickled_weights(self, folder: Path) -> None:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
        self.refuse(folder, "unet: holds no safetensors")

    def test_no_site(self, folder: Path) -> None:
        self.refuse(folder, "matches no layer", sites="nothing")
        self.refuse(folder, "not a regular expression", sites="(")


def test_hash_ignores_cards_and_images(pipeline_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))
    assert assets.digest(copy) == assets.digest(pipeline_folder)
    (copy / "README.md").write_text("a card")
    assert assets.digest(copy) == assets.digest(pipeline_folder)
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
    assert assets.digest(copy) != assets.digest(pipeline_folder)
