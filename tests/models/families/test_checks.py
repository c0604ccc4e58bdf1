"""Unusual configurations are refused in one line before anything is built, or work correctly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.tiny_pipelines import save
from client.cli.plan import main as plan
from common.errors import AntherError
from models.base.base import Base
from models.families.checkpoint import recognize
from tests.models.conftest import TinyPipeline

UNET, VAE, SCHEDULER = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"
GONE = object()


@pytest.fixture
def folder(pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))


def change(file: Path, **changes: object) -> None:
    result = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in result.items() if value is not GONE}))


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        (UNET, {"in_channels": 9}, "takes latents of 9 channels, maybe for inpainting, and its vae makes 4"),
        (UNET, {"in_channels": 8, "out_channels": 4}, "takes latents of 8 channels"),
        (UNET, {"in_channels": None}, "in_channels=None"),
        (UNET, {"in_channels": True}, "in_channels=True"),
        (UNET, {"out_channels": 5}, "takes 4 channels and makes 5"),
        (UNET, {"sample_size": None}, "has no sample_size: set base.resolution"),
        (UNET, {"sample_size": GONE}, "has no sample_size: set base.resolution"),
        (UNET, {"sample_size": [8, 16]}, r"sample_size=\[8, 16\]"),
        (UNET, {"sample_size": "8"}, "sample_size=8"),
        (UNET, {"sample_size": 10**6}, "sample_size=1000000"),
        (UNET, {"sample_size": 0}, "sample_size=0"),
        (UNET, {"block_out_channels": [10**12, 8]}, "block_out_channels=.*not plausible"),
        (UNET, {"cross_attention_dim": float("nan")}, "cross_attention_dim=nan"),
        (UNET, {"time_cond_proj_dim": "x"}, "time_cond_proj_dim=x"),
        (UNET, {"norm_eps": [None]}, r"norm_eps=.*, but UNet2DConditionModel has 1e-05 by default"),
        (UNET, {"freq_shift": "epsilon"}, "freq_shift=epsilon"),
        (UNET, {"block_out_channels": 7}, "block_out_channels=7"),
        (UNET, {"layers_per_block": 10**4}, "layers_per_block=10000: not plausible"),
        (UNET, {"quantization_config": {"quant_method": "bitsandbytes"}}, "already quantized"),
        (VAE, {"latent_channels": 16}, "takes latents of 4 channels and its vae makes 16"),
        (VAE, {"scaling_factor": None}, "scaling_factor=None"),
        (VAE, {"scaling_factor": 0}, "scaling_factor=0"),
        (VAE, {"scaling_factor": float("inf")}, "scaling_factor=inf"),
        (VAE, {"shift_factor": "x"}, "shift_factor=x"),
        (VAE, {"block_out_channels": GONE}, "block_out_channels=None"),
        (VAE, {"block_out_channels": [8] * 100}, "block_out_channels="),
        (
            VAE,
            {"latents_mean": [1.0] * 4, "latents_std": [1.0] * 4},
            "latents_mean, which diffusers' StableDiffusionPipeline",
        ),
        (SCHEDULER, {"beta_schedule": "exponential"}, "beta_schedule=exponential: only"),
        (SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid: only"),
        (SCHEDULER, {"num_train_timesteps": None}, "num_train_timesteps=None"),
        (SCHEDULER, {"num_train_timesteps": "1000"}, "num_train_timesteps='1000'"),
        (SCHEDULER, {"num_train_timesteps": 10**9}, "num_train_timesteps=1000000000"),
        (SCHEDULER, {"num_train_timesteps": 0}, "num_train_timesteps=0"),
        (SCHEDULER, {"beta_start": None}, "beta_start=None"),
        (SCHEDULER, {"beta_end": 5.0}, "beta_end=5"),
        (SCHEDULER, {"trained_betas": [0.1, "x"]}, "trained_betas"),
        (SCHEDULER, {"trained_betas": []}, "trained_betas"),
        (SCHEDULER, {"prediction_type": None}, "predicts None"),
        (SCHEDULER, {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "zero terminal signal"),
        ("model_index.json", {"image_encoder": []}, r"image_encoder=\[\]: must be \[library, class\]"),
        ("model_index.json", {"vae": ["diffusers", 5]}, "must be .library, class"),
        ("model_index.json", {"text_encoder": [None, None]}, "was saved without its text_encoder"),
    ],
)
def test_invalid_values_are_refused(folder: Path, file: str, changes: dict[str, Any], match: str) -> None:
    change(folder / file, **changes)
    with pytest.raises(AntherError, match=match) as refusal:
        Base(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "\xff", '{"a": 1}'])
@pytest.mark.parametrize("file", [UNET, VAE, SCHEDULER, "model_index.json", "text_encoder/config.json"])
def test_non_object_configuration(folder: Path, file: str, text: str) -> None:
    (folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(AntherError) as refusal:
        Base(folder).encode_captions(["cat"])
    assert "\n" not in str(refusal.value)


def test_equivalent_sizes(folder: Path) -> None:
    plain = Base(folder)
    change(folder / UNET, sample_size=[8, 8])
    assert Base(folder).resolution == plain.resolution
    change(folder / UNET, sample_size=None)
    assert Base(folder, resolution=16).shape == plain.shape


def test_vae_defaults_to_color(tmp_path: Path) -> None:
    folder = save("stable_diffusion", tmp_path)
    change(folder / VAE, in_channels=GONE)
    assert Base(folder).decode(torch.zeros(1, 4, 8, 8)).shape == (1, 16, 16, 3)


def test_plan_prints_the_same_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / UNET, sample_size=None)
    assert plan([f"base={folder}", "device=pi4_4gb"]) == 2
    assert "no sample_size" in capsys.readouterr().err
    change(folder / UNET, sample_size=8, in_channels=9)
    assert plan([f"base={folder}", "device=pi4_4gb"]) == 2
    assert "9 channels" in capsys.readouterr().err


def test_sd3_requires_t5(tiny: TinyPipeline, tmp_path: Path) -> None:
    if tiny.name != "sd3":
        pytest.skip("of sd3")
    copy = Path(shutil.copytree(tiny.folder, tmp_path / "copy"))
    change(copy / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    with pytest.raises(AntherError, match="was saved without its tokenizer_3, which encodes captions"):
        recognize(copy)


def test_sdxl_latent_statistics(tiny: TinyPipeline, tmp_path: Path) -> None:
    if tiny.name != "sdxl":
        pytest.skip("of SDXL")
    copy = Path(shutil.copytree(tiny.folder, tmp_path / "copy"))
    mean, deviation = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 4.0, 1.0]
    change(copy / VAE, latents_mean=mean, latents_std=deviation)
    base, scale = Base(copy, resolution=64), tiny.base._checkpoint.load("vae").config.scaling_factor
    picture = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()
    raw = tiny.base.encode_images([picture])[0] / scale
    expected = (raw - torch.tensor(mean)[:, None, None]) * scale / torch.tensor(deviation)[:, None, None]
    torch.testing.assert_close(base.encode_images([picture])[0], expected)
    import diffusers  # its own pipeline decodes the same latents to the same image

    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(copy)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, *base.shape, generator=torch.Generator().manual_seed(0))
    result: list[Any] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents, **more: (result.append(latents), decode(latents, **more))[1]
    pipeline("cat", latents=latents.clone(), num_inference_steps=1, height=64, width=64, guidance_scale=1.0)
    drawn = pipeline(
        "cat",
        latents=latents.clone(),
        num_inference_steps=1,
        height=64,
        width=64,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    own = base._checkpoint.load("vae")
    pixels = own.decode(result[0]).sample.float()
    wanted_pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert abs(base.decode(drawn).astype(int) - wanted_pixels.astype(int)).max() <= 1
    for key, value in (("latents_std", None), ("latents_std", [1.0] * 3), ("latents_mean", [1.0, 2.0, "x", 4.0])):
        change(copy / VAE, **{"latents_mean": mean, "latents_std": deviation, key: value})
        with pytest.raises(AntherError, match=f"{key}="):
            Base(copy, resolution=64)
    change(copy / VAE, latents_mean=mean, latents_std=[1.0, 0.0, 1.0, 1.0])
    with pytest.raises(AntherError, match="must be over 0"):
        Base(copy, resolution=64)


class TestGuidanceEmbedding:
    """UNets that were distilled to take the guidance scale as an input (LCM)."""

    @pytest.fixture(params=["stable_diffusion", "sdxl"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        from diffusers import UNet2DConditionModel

        folder = save(request.param, tmp_path)
        config = json.loads((folder / UNET).read_text()) | {"time_cond_proj_dim": 9}
        torch.manual_seed(1)
        unet = UNet2DConditionModel.from_config(config)
        torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
        unet.save_pretrained(folder / "unet")
        return folder

    @pytest.mark.integration
    @pytest.mark.parametrize("guidance", [1.0, 4.5])
    def test_samples_equal_diffusers(self, folder: Path, guidance: float) -> None:
        import diffusers

        from models.diffusion.sampling import sample

        base = Base(folder, resolution=64 if "sdxl" in str(folder) or (folder / "text_encoder_2").exists() else 16)
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
        noise = torch.randn(1, *base.shape, generator=torch.Generator().manual_seed(0))
        side = base.resolution
        reference = pipeline(
            "fox",
            latents=noise,
            num_inference_steps=4,
            guidance_scale=guidance,
            output_type="latent",
            height=side,
            width=side,
        ).images
        conditioning = base.encode_guidance(["fox"], guidance)
        assert (conditioning.null, conditioning.strength) == (None, 1.0)
        with base.use_adapters([]) as denoise:
            actual = sample("ddim", denoise, base.schedule, [noise], conditioning.context, steps=4)
        assert (actual - reference).abs().max() <= 1e-4 * reference.abs().max()
        with base.use_adapters([]) as denoise, torch.no_grad():
            other = sample("ddim", denoise, base.schedule, [noise], base.encode_guidance(["fox"], 7.0).context, steps=4)
        assert (other - actual).abs().max() > 1e-3 * actual.abs().max()

    def test_packed_caption_shape(self, folder: Path) -> None:
        checkpoint = recognize(folder)
        rows, width = checkpoint.family.context(checkpoint.config("unet"))
        base = Base(folder, resolution=64)
        assert base.encode_captions(["fox"])[0].shape == (rows - 77 + 8, width)
