"""Compare the mathematics of pretraining with numpy, and a resumed run with an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from common.errors import AntherError
from conf.schemas.pretraining import StageConfig, TrainBaseConfig, TrainJudgeConfig
from typefaces.dataset import GLYPHS, caption
from typefaces.pretraining.corpus import Jitter, apply_jitter, held_out, warp
from typefaces.pretraining.diffusion import (
    denoising_loss,
    diffuse,
    drop_captions,
    min_snr_weights,
    stratified_timesteps,
)
from typefaces.pretraining.loop import ema_decay, learning_rate, train
from typefaces.pretraining.vae import reconstruction_loss, reparameterize, scaling_factor


def test_v_target() -> None:
    x, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 2)).astype(np.float32)
    alpha_bar = np.array([0.0, 0.3, 1.0], np.float32)
    noisy, target = diffuse(torch.from_numpy(x), torch.from_numpy(noise), torch.from_numpy(alpha_bar))
    angle = np.arccos(np.sqrt(alpha_bar))[:, None, None, None]
    assert np.allclose(noisy, np.cos(angle) * x + np.sin(angle) * noise, atol=1e-6)
    assert np.allclose(target, np.cos(angle) * noise - np.sin(angle) * x, atol=1e-6)


def test_min_snr_weights() -> None:
    alpha_bar = np.array([0.01, 0.5, 0.9, 0.999])
    snr = alpha_bar / (1 - alpha_bar)
    weights = min_snr_weights(torch.from_numpy(alpha_bar), 5.0)
    assert np.allclose(weights, np.minimum(snr, 5) / (snr + 1))
    assert torch.isfinite(min_snr_weights(torch.tensor([0.0, 1.0]), 5.0)).all()
    assert min_snr_weights(torch.from_numpy(alpha_bar), None).tolist() == [1, 1, 1, 1]


def test_denoising_loss() -> None:
    latents, alphas = torch.ones(2, 4, 2, 2), torch.tensor([0.75, 0.25])
    t = torch.tensor([0, 1])
    loss = denoising_loss(
        lambda x, *_: torch.zeros_like(x),
        latents,
        torch.zeros(2, 1, 1),
        alphas=alphas,
        generator=Generator().manual_seed(3),
        timesteps=t,
    )
    noise = torch.randn(2, 4, 2, 2, generator=Generator().manual_seed(3)).numpy()
    a = alphas.numpy()[:, None, None, None]
    assert float(loss) == pytest.approx(float(np.mean((np.sqrt(a) * noise - np.sqrt(1 - a)) ** 2)), rel=1e-6)


def test_stratified_timesteps() -> None:
    t = stratified_timesteps(50, 1000, Generator().manual_seed(0))
    assert sorted((t // 20).tolist()) == list(range(50))


def test_zero_terminal_snr() -> None:
    from typefaces.pretraining import architecture  # imports a pipeline of diffusers

    alphas = architecture.scheduler().alphas_cumprod
    assert alphas[-1] == 0
    assert alphas[0] > 0.999
    assert (alphas.diff() < 0).all()


def test_caption_dropout() -> None:
    dropped = drop_captions(torch.zeros(20_000).long(), empty=62, share=0.1, generator=Generator().manual_seed(0))
    assert set(dropped.tolist()) == {0, 62}
    assert abs(float((dropped == 62).float().mean()) - 0.1) < 0.01


def test_kl_and_scaling_factor() -> None:
    latents, kl = reparameterize(torch.zeros(500, 8, 4, 4), Generator().manual_seed(0))
    assert float(kl) == 0
    assert float((latents * 3 * scaling_factor(latents * 3)).std()) == pytest.approx(1, rel=1e-5)
    assert float(reconstruction_loss(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5))) == 0.75


def test_tokenizer() -> None:
    from typefaces.pretraining import architecture

    tokenizer = architecture.tokenizer()
    for glyph in GLYPHS:
        ids = tokenizer(caption(glyph)).input_ids
        assert len(ids) == 2 + len(caption(glyph).split())
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption(glyph).lower()
    assert len({tuple(tokenizer(caption(glyph)).input_ids) for glyph in GLYPHS}) == len(GLYPHS)
    ids = tokenizer("héllo 漢字").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "héllo 漢字"
    assert max(ids) < len(architecture.vocabulary()[0])


def test_held_out_split() -> None:
    held = [held_out(f"design {i}", share=0.08, seed=0) for i in range(5000)]
    assert abs(np.mean(held) - 0.08) < 0.02
    assert held == [held_out(f"design {i}", share=0.08, seed=0) for i in range(5000)]


def test_jitter() -> None:
    pictures = torch.rand(3, 1, 16, 16, generator=Generator().manual_seed(0)) * 2 - 1
    generator = Generator().manual_seed(1)
    assert torch.allclose(apply_jitter(pictures, Jitter().draw(3, generator)), pictures, atol=1e-5)
    assert torch.allclose(warp(pictures, 0.0, generator), pictures, atol=1e-5)


def tiny_stage(**changes: object) -> StageConfig:
    return StageConfig(
        **{
            "steps": 6,
            "batch_size": 4,
            "warmup": 2,
            "compile": False,
            "bf16": False,
            "checkpoint_interval": 3,
            **changes,
        }  # type: ignore[arg-type]
    )


def run(folder: Path, *, resume: bool = False, stop_at: int | None = None) -> nn.Module:
    """Train a tiny denoiser; `stop_at` interrupts that step."""
    torch.manual_seed(0)
    model = nn.Conv2d(4, 4, 3, padding=1)
    data = torch.randn(16, 4, 4, 4, generator=Generator().manual_seed(9))
    calls = 0

    from typefaces.pretraining import architecture

    def loss(generator: Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        rows = torch.randint(16, (4,), generator=generator)
        context = torch.zeros(4, 1, 1)
        alphas = architecture.scheduler().alphas_cumprod
        return denoising_loss(lambda x, *_: model(x), data[rows], context, alphas=alphas, generator=generator)

    return train(model, loss, stage=tiny_stage(), name="tiny", seed=5, folder=folder, resume=resume)


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", stop_at=5)  # two steps past the checkpoint
    resumed = run(tmp_path / "broken", resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    files = [(tmp_path / name / "tiny.safetensors").read_bytes() for name in ("whole", "broken")]
    assert len(files[0]) > 1000
    assert abs(len(files[0]) - len(files[1])) < 64  # seconds in the header may differ


def test_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(AntherError, match="resume=false") as refused:
        run(tmp_path, resume=True)
    assert "\n" not in str(refused.value)


def test_divergence_is_reported(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(AntherError, match=r"lower tiny\.lr"):
        train(
            model,
            lambda _: model.weight.sum() * float("nan"),
            stage=tiny_stage(),
            name="tiny",
            seed=0,
            folder=tmp_path,
            resume=False,
        )


def test_ema(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    stage = tiny_stage(ema_decay=0.9, steps=4)
    path: list[float] = []

    def loss(_: Generator) -> Tensor:
        path.append(float(model.weight.detach()))
        return model.weight.sum()

    averaged = train(model, loss, stage=stage, name="tiny", seed=0, folder=tmp_path, resume=False)
    truth = path[0]
    for step, weight in enumerate([*path[1:], float(model.weight.detach())]):
        truth += (1 - min(0.9, (1 + step) / (10 + step))) * (weight - truth)
    assert float(averaged.weight) == pytest.approx(truth, rel=1e-5)
    assert ema_decay(stage, 10_000) == 0.9


def test_learning_rate() -> None:
    stage = tiny_stage(lr=1.0, warmup=10)
    assert learning_rate(stage, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(stage, 50, 0.5) == pytest.approx(0.5)
    assert learning_rate(stage, 99, 1.0) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("schema", "values", "message"),
    [
        (StageConfig, {"steps": 0}, "steps=0"),
        (StageConfig, {"ema_decay": 1.0}, "ema_decay=1.0"),
        (StageConfig, {"seconds": 0.0}, "seconds=0.0"),
        (TrainBaseConfig, {"device": "tpu"}, "one of: auto, cpu, cuda"),
        (TrainBaseConfig, {"caption_dropout": 1.0}, "caption_dropout=1.0"),
        (TrainBaseConfig, {"min_snr": 0.0}, "min_snr=0.0"),
        (TrainJudgeConfig, {"held_out": 0.0}, "held_out=0.0"),
        (TrainJudgeConfig, {"styles": 0}, "styles=0"),
    ],
)
def test_invalid_config_is_refused(schema: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schema(**values)
