"""Train the glyph base from scratch:  python -m typefaces.train_base

Three stages, the first two resumable (`resume=true`): an autoencoder on public families; a denoiser together with its
text encoder on their latents; evaluation on held-out families. Writes to `output`: `glyphs-base/` in
StableDiffusionPipeline layout with metrics.json, and contact sheets.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from common.errors import AntherError
from conf.cli import hydra_application
from conf.schemas.pretraining import PretrainingConfig, TrainBaseConfig
from typefaces import dataset
from typefaces.judge import load as load_judge
from typefaces.pretraining import architecture, corpus, evaluation
from typefaces.pretraining.diffusion import denoising_loss, drop_captions
from typefaces.pretraining.loop import train
from typefaces.pretraining.pen import center_lines, draw, draw_radii
from typefaces.pretraining.vae import encode, reconstruction_loss, reparameterize, scaling_factor
from typefaces.strokes import normalize

PLACES = corpus.Jitter(shift=0.08, width=0.12, height=0.12, slant=0.3, weight=0.8)  # augmentation for the autoencoder
STYLES = corpus.Jitter(width=0.12, slant=0.25, weight=0.7)  # for the denoiser; baselines don't move
BEND = 0.03
PEN_BEND = 0.06


def torch_device(config: PretrainingConfig) -> torch.device:
    """Return the torch device that the configuration names."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise AntherError("device=cuda: PyTorch sees no CUDA device; try device=auto")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return torch.device(name)


def load_public_families(config: PretrainingConfig) -> tuple[list[dataset.Typeface], list[dataset.Typeface]]:
    """Return the public families: (training, held out)."""
    families = dataset.load("public", Path(config.dataset) if config.dataset else None)
    training, held = corpus.split_held_out(families, share=config.held_out, seed=config.seed)
    if not training or not held:
        raise AntherError(
            f"held_out={config.held_out} leaves {len(training)} training and {len(held)} held-out families: change it"
        )
    return training, held


def train_vae(config: TrainBaseConfig, images: Tensor, nearness: Tensor | None) -> AutoencoderKL:
    """Train the autoencoder on jittered glyphs, printed and drawn with a pen.

    Args:
        config: configuration of the run.
        images: glyphs, uint8 [N, 1, 64, 64].
        nearness: their center lines (`pretraining.pen`), uint8 [N, 1, 64, 64]; None: none is drawn with a pen.
    """
    penned = 0 if nearness is None else round(config.pen * config.vae.batch_size)
    vae = architecture.autoencoder().to(images.device)

    def code(pictures: Tensor) -> Tensor:
        return vae.quant_conv(vae.encoder(pictures))

    def decode(latents: Tensor) -> Tensor:
        return vae.decoder(vae.post_quant_conv(latents))

    if config.vae.compile:
        code, decode = torch.compile(code), torch.compile(decode)

    def loss(generator: Generator) -> Tensor:
        rows = torch.randint(len(images), (config.vae.batch_size,), generator=generator, device=images.device)
        pictures = draw_printed(images[rows[penned:]], generator)
        if nearness is not None and penned:
            pictures = torch.cat([pictures, draw_penned(nearness[rows[:penned]], PLACES, generator)])
        latents, kl = reparameterize(code(pictures), generator)
        return reconstruction_loss(decode(latents), pictures) + config.kl_weight * kl

    return train(
        vae, loss, stage=config.vae, name="vae", seed=config.seed, folder=checkpoint_dir(config), resume=config.resume
    )


def draw_printed(images: Tensor, generator: Generator) -> Tensor:
    """Return jittered glyphs in [-1, 1] from uint8 images [B, 1, 64, 64]."""
    return corpus.apply_jitter(normalize(images), PLACES.draw(len(images), generator))


def draw_penned(nearness: Tensor, jitter: corpus.Jitter, generator: Generator) -> Tensor:
    """Draw center lines, jittered and bent, with a random pen.

    Args:
        nearness: uint8 [B, 1, 64, 64].
        jitter: ranges of the augmentation; its weight is not used, since the pen has a width.
        generator: generator of the augmentation and the pens.
    """
    values = replace(jitter, weight=0.0).draw(len(nearness), generator)
    lines = corpus.warp(corpus.apply_jitter(normalize(nearness), values), PEN_BEND, generator)
    return draw(lines, draw_radii(len(nearness), generator))


def encode_variants(config: TrainBaseConfig, vae: AutoencoderKL, images: Tensor, nearness: Tensor | None) -> Tensor:
    """Encode each glyph and copies of it, jittered or drawn with a pen, to unscaled latents [N, variants, 4, 16, 16].

    Args:
        config: sets seed and number of variants.
        vae: trained autoencoder.
        images: uint8 [N, 1, 64, 64].
        nearness: their center lines, uint8 [N, 1, 64, 64]; None: none is drawn with a pen.
    """
    generator = Generator(images.device).manual_seed(config.seed)
    variants, penned = [], 0 if nearness is None else round(config.pen * config.variants)
    for variant in range(config.variants - penned):
        parts = []
        for part in images.split(2048):
            pictures = normalize(part)
            if variant:
                pictures = corpus.apply_jitter(pictures, STYLES.draw(len(part), generator))
                pictures = corpus.warp(pictures, BEND, generator)
            parts.append(encode(vae, pictures))
        variants.append(torch.cat(parts))
    for _ in range(penned):
        assert nearness is not None
        drawn = (draw_penned(part, STYLES, generator) for part in nearness.split(2048))
        variants.append(torch.cat([encode(vae, pictures) for pictures in drawn]))
    return torch.stack(variants, dim=1)


def captions(device: torch.device) -> Tensor:
    """Return token ids [63, 16] of the captions of all glyphs, followed by the empty caption."""
    texts = [dataset.caption(glyph) for glyph in dataset.GLYPHS] + [""]
    tokens = architecture.tokenizer()(
        texts, padding="max_length", max_length=architecture.TOKENS, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids.to(device)


def train_denoiser(config: TrainBaseConfig, latents: Tensor) -> nn.ModuleDict:
    """Train UNet and text encoder together on scaled latents [N, variants, 4, 16, 16]."""
    device = latents.device
    model = nn.ModuleDict({"unet": architecture.unet(), "text_encoder": architecture.text_encoder()}).to(device)
    tokens, alphas = captions(device), architecture.scheduler().alphas_cumprod.to(device)

    def denoise(noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return model["unet"](noisy, timesteps, context, return_dict=False)[0]

    if config.diffusion.compile:
        denoise = torch.compile(denoise)

    def loss(generator: Generator) -> Tensor:
        shape = (config.diffusion.batch_size,)
        rows = torch.randint(len(latents), shape, generator=generator, device=device)
        variants = torch.randint(latents.shape[1], shape, generator=generator, device=device)
        classes = drop_captions(
            corpus.glyph_class(rows), empty=len(tokens) - 1, share=config.caption_dropout, generator=generator
        )
        context = model["text_encoder"](tokens).last_hidden_state[classes]
        return denoising_loss(
            denoise, latents[rows, variants], context, alphas=alphas, generator=generator, gamma=config.min_snr
        )

    return train(
        model,
        loss,
        stage=config.diffusion,
        name="diffusion",
        seed=config.seed,
        folder=checkpoint_dir(config),
        resume=config.resume,
    )


def checkpoint_dir(config: PretrainingConfig) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(config.output) / "checkpoints"


@torch.no_grad()
def measure(
    config: TrainBaseConfig, vae: AutoencoderKL, model: nn.ModuleDict, held: list[dataset.Typeface]
) -> dict[str, Any]:
    """Measure reconstruction, denoising loss and legibility per guidance scale; writes contact sheets.

    Args:
        config: configuration of the run.
        vae: trained autoencoder.
        model: UNet and text encoder.
        held: held-out families.

    Returns:
        Metrics for metrics.json.
    """
    device, out = next(model.parameters()).device, Path(config.output)
    unseen = corpus.pictures(held).to(device)
    error, restored = evaluation.reconstruction(vae, unseen)
    rows = slice(0, 31 * min(4, len(unseen) // 31))
    real, again = (p[rows].view(-1, 31, 64, 64) for p in (unseen[:, 0].cpu(), torch.from_numpy(restored)))
    pairs = torch.stack([real, again], dim=1)  # each row of glyphs above its reconstruction
    evaluation.sheet(pairs.reshape(-1, 64, 64).numpy(), 31, out / "reconstructions.png")

    latents = encode(vae, normalize(unseen)) * vae.config.scaling_factor
    context = model["text_encoder"](captions(device)).last_hidden_state[corpus.glyph_class(torch.arange(len(unseen)))]
    loss = evaluation.fixed_loss(
        lambda x, t, c: model["unet"](x, t, c, return_dict=False)[0],
        latents,
        context,
        alphas=architecture.scheduler().alphas_cumprod.to(device),
        seed=config.seed,
    )
    metrics: dict[str, Any] = {
        "held_out_families": len(held),
        "reconstruction_l1": error,
        "denoising_loss": loss,
        "legibility": {},
    }
    judge = load_judge(config.judge, device=device.type) if config.judge else None
    pipe = architecture.pipeline(vae=vae, text_encoder=model["text_encoder"], unet=model["unet"])
    for guidance in config.guidance_scales:
        if judge:
            share, pictures = evaluation.legibility(
                pipe,
                judge,
                count=config.samples,
                guidance=guidance,
                steps=config.sampling_steps,
                seed=config.seed,
            )
            metrics["legibility"][f"{guidance:g}"] = share
            evaluation.sheet(pictures[:496], 31, out / f"samples-{guidance:g}.png")
    return metrics


@hydra_application("train_base", TrainBaseConfig)
def main(config: TrainBaseConfig) -> None:
    """Train, evaluate and save the base."""
    device = torch_device(config)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    training, held = load_public_families(config)
    images = corpus.pictures(training).to(device)
    nearness = center_lines(images) if config.pen else None
    vae = train_vae(config, images, nearness)
    latents = encode_variants(config, vae, images, nearness)
    vae.register_to_config(scaling_factor=scaling_factor(latents))
    torch.manual_seed(config.seed)  # same initial weights whether or not the autoencoder was resumed
    model = train_denoiser(config, latents * vae.config.scaling_factor)
    metrics = measure(config, vae, model, held)
    digest = dataset.digest(Path(config.dataset) if config.dataset else None)
    metrics |= {"training_families": len(training), "data_sha256": digest}
    folder = Path(config.output) / "glyphs-base"
    architecture.save_pipeline(
        architecture.pipeline(vae=vae, text_encoder=model["text_encoder"], unet=model["unet"]), folder
    )
    record = {"metrics": metrics, "config": asdict(config), "torch": torch.__version__}
    (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
    main()
