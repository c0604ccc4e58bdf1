"""The frozen base: a folder in StableDiffusionPipeline layout, ready to carry adapters.

The UNet stays; the VAE and the text encoder are loaded to encode pictures once, and freed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conf.errors import AntherError
from models import assets, packed
from models.denoiser import Denoiser
from models.objective import Schedule

PIPELINE = "StableDiffusionPipeline"


class Base(Denoiser):
    """One frozen base on one torch device, with its encoders at hand.

    Attributes:
        hash: content hash of the folder; devices prove by it that they hold the same base.
        shape: latent shape (c, h, w).
        resolution: side of a picture in pixels.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sites: str,
        weights: str = "fp32",
        device: str = "cpu",
        compute: str = "fp32",
        checkpointing: str = "none",
    ) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel  # slow imports, so only here

        _check(folder)
        self.folder, self.hash = folder, assets.digest(folder)
        unet: nn.Module
        if packed.is_packed(folder / "unet"):
            unet, weights = packed.load(folder / "unet", UNet2DConditionModel.__name__, weights), "fp32"
        else:
            unet = _load(UNet2DConditionModel, folder / "unet")
        config: Any = unet.config
        scheduler: Any = DDIMScheduler.from_pretrained(folder / "scheduler")
        schedule = Schedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)
        super().__init__(
            unet, schedule, sites=sites, device=device, compute=compute, weights=weights, checkpointing=checkpointing
        )
        vae = json.loads((folder / "vae" / "config.json").read_text())
        self._scale = 2 ** (len(vae["block_out_channels"]) - 1)
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self._grey = vae["in_channels"] == 1
        self.resolution = config.sample_size * self._scale

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray], batch: int = 16) -> Tensor:
        """Scaled latents [n, c, h, w] of uint8 pictures of any size, grey or colour: the mean of the posterior.

        Passes are always of `batch` pictures, filled up with the last: the latents of a picture don't depend on how
        many others there are; nor on which, nor on its place among them, to the last bit (tested on CPUs).
        """
        from diffusers import AutoencoderKL

        vae: Any = _load(AutoencoderKL, self.folder / "vae").to(self.device)
        pixels = torch.from_numpy(np.stack([self.fit(image) for image in images])).float() / 127.5 - 1
        pixels = pixels[:, None] if self._grey else pixels.permute(0, 3, 1, 2)
        filled = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % batch, -1, -1, -1)])
        latents = [vae.encode(part.to(self.device)).latent_dist.mode() for part in filled.split(batch)]
        return (torch.cat(latents)[: len(pixels)] - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings [n, tokens, d]; captions that repeat are encoded once.

        Each by itself: an embedding doesn't depend on which others there are, to the last bit. In one pass together
        the order of its sums could, and then one picture more would change the gradients of others.
        """
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        distinct = list(dict.fromkeys(captions))
        tokenizer: Any = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
        encoder: Any = _load(CLIPTextModel, self.folder / "text_encoder").to(self.device)
        tokens = tokenizer(
            distinct, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        embeddings = torch.cat([encoder(row)[0] for row in tokens.input_ids.to(self.device).split(1)])
        place = {caption: row for row, caption in enumerate(distinct)}
        return embeddings[[place[caption] for caption in captions]]

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 64) -> np.ndarray:
        """Pictures uint8 [n, H, W] (grey base) or [n, H, W, 3] from scaled latents [n, c, h, w]."""
        from diffusers import AutoencoderKL

        vae: Any = _load(AutoencoderKL, self.folder / "vae").to(self.device)
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels = torch.cat([vae.decode(part).sample for part in latents.split(batch)])
        pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        return (pixels[:, 0] if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1)).numpy()

    def fit(self, image: np.ndarray) -> np.ndarray:
        """A picture as the base sees it, uint8: grey or colour as its VAE, its centre square at its resolution."""
        from PIL import Image, ImageOps

        picture = Image.fromarray(image).convert("L" if self._grey else "RGB")
        return np.array(ImageOps.fit(picture, (self.resolution, self.resolution), Image.Resampling.LANCZOS))


def load(path: str, *, device: str = "cpu", **options: str) -> Base:
    """The base of that name or folder; `device` may be 'auto', `options` are those of Base.

    Raises:
        AntherError: it is missing or of another kind.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Base(assets.locate(path), device=device, **options)


def _check(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise AntherError(f"base {folder}: no model_index.json in it: give a folder in {PIPELINE} layout")
    try:
        found: Mapping[str, Any] = json.loads(index.read_text())
    except ValueError as error:
        raise AntherError(f"base {folder}: model_index.json is not JSON ({error})") from error
    if found.get("_class_name") != PIPELINE:
        raise AntherError(f"base {folder}: holds a {found.get('_class_name')}: only {PIPELINE} is supported")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise AntherError(f"base {folder}: its folder {part} is missing: copy the whole pipeline")


def _load(kind: Any, folder: Path) -> Any:
    """A part of the pipeline in float32, from safetensors only, never from the network."""
    try:
        part = kind.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged or foreign file
        reason = " ".join(str(error).split())[:200]
        raise AntherError(f"base {folder}: can't load {kind.__name__} ({reason}): copy the pipeline again") from error
    return part.eval()
