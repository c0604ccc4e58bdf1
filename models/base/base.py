"""The frozen base: a diffusers pipeline in a folder, ready for adapters.

The network stays in memory. VAE and text encoders are loaded to encode images and captions once, then freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import AntherError, summary
from models.diffusion import decoding
from models.diffusion.denoiser import Denoise, Denoiser
from models.families.checkpoint import recognize
from models.files import assets
from models.lora.batched_lora import BatchedAdapter
from models.quantization import packed


class Guidance(NamedTuple):
    """Conditioning of generated images."""

    context: Tensor  # [n, rows, d]
    null: Tensor | None  # [rows, d] unconditional context of the second pass; None: the network embeds the scale
    strength: float  # guidance scale between the two passes


class Base(Denoiser):
    """One frozen base on one torch device.

    Args:
        folder: pipeline in diffusers' layout.
        sites: attention, linear, all, or a regular expression on the names of the network's layers
            (`models.diffusion.sites`); None: attention, the family's default.
        weights: one of `models.quantization.modes.WEIGHT_MODES`.
        device: torch device.
        compute: precision of weights and activations, see `Denoiser`.
        checkpointing: 'none' or 'block', see `Denoiser`.
        resolution: side of an image in pixels; None: the network's native resolution.

    Attributes:
        hash: content hash of the folder, by which devices verify that they have the same base.
        family: architecture-specific functions and constants.
        provenance: family, license and safety checker, copied into the metadata of exported adapters.
        shape: latent shape (c, h, w).
        resolution: side of an image in pixels.
        native_resolution: side in pixels of the images that the network was trained for; None if its configuration
            doesn't say.

    Raises:
        AntherError: the folder is incomplete, damaged, or not supported.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sites: str | None = None,
        weights: str = "fp32",
        device: str = "cpu",
        compute: str = "fp32",
        checkpointing: str = "none",
        resolution: int | None = None,
    ) -> None:
        self._checkpoint = checkpoint = recognize(folder)
        self.folder, self.family, self.provenance = folder, checkpoint.family, checkpoint.provenance()
        self._gray = checkpoint.config("vae").get("in_channels", 3) == 1
        channels, side, patch = self.family.latents(checkpoint.config(self.family.network))
        scale = checkpoint.scale
        if resolution is None and side is None:
            raise AntherError(f"base {folder}: its {self.family.network} has no sample_size: set base.resolution")
        self.native_resolution = None if side is None else side * scale
        self.resolution = resolution or (side or 0) * scale
        if self.resolution % (patch * scale):
            raise AntherError(f"base {folder}: {self.resolution} pixels: must be a multiple of {patch * scale}")
        side = self.resolution // scale
        self.shape = (channels, side, side)
        schedule = checkpoint.schedule((side // patch) ** 2)
        part = folder / self.family.network
        if packed.is_packed(part):
            network, weights = packed.load(part, checkpoint.parts[self.family.network], weights), "fp32"
        else:
            network = checkpoint.load(self.family.network)
        self.hash = assets.digest(folder)
        super().__init__(
            network,
            schedule,
            sites=sites,
            device=device,
            compute=compute,
            weights=weights,
            checkpointing=checkpointing,
            forward=self.family.forward,
            attention=self.family.sites,
        )

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the network."""
        network: Any = self.network
        config: Mapping[str, Any] = network.config
        return config

    @property
    def prediction(self) -> str:
        """Quantity that the network predicts: epsilon, v_prediction, sample or flow."""
        return self.schedule.prediction

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray], ask: Callable[[], None] = lambda: None) -> Tensor:
        """Encode uint8 images of any size, gray or color, as scaled posterior means [n, c, h, w].

        All passes have the same batch size; the last one is padded with its last image. Therefore an image's latents
        don't depend on the number of other images, on the other images, or on its position, to the last bit (tested on
        CPUs).

        Args:
            images: [H, W] or [H, W, 3] each.
            ask: called before each pass; may raise to stop.
        """
        batch = self._vae_batch(16)
        vae: Any = self._checkpoint.load("vae").to(self.device)
        pixels = torch.from_numpy(np.stack([self.preprocess(image) for image in images])).float() / 127.5 - 1
        pixels = pixels[:, None] if self._gray else pixels.permute(0, 3, 1, 2)
        padded = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % batch, -1, -1, -1)])
        encoded = []
        for part in padded.split(batch):
            ask()
            with self._wrap_errors("vae"):
                encoded.append(_latents(vae.encode(part.to(self.device))))
        latents = torch.cat(encoded)
        shift, scale = _statistics(vae, latents)
        return self._check_finite((latents[: len(pixels)] - shift) * scale, "vae")

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str | None], ask: Callable[[], None] = lambda: None) -> Tensor:
        """Encode captions as [n, rows, d] in the family's packed format; None is the unconditional caption.

        Each distinct caption is encoded once and by itself, so that its embedding doesn't depend on the other captions,
        to the last bit. In a shared pass the order of sums could change, and then one more image would change the
        gradients of others.

        Args:
            captions: one per image.
            ask: called before each pass; may raise to stop.
        """
        encoders: Any = self._checkpoint.load_encoders().to(self.device)
        distinct = {}
        for caption in dict.fromkeys(captions):
            ask()
            with self._wrap_errors("text encoder"):
                distinct[caption] = self.family.encode(encoders, caption)
        with self._wrap_errors("text encoder"):  # lengths differ if the tokenizer doesn't pad
            stacked = torch.stack([distinct[caption] for caption in captions])
        return self._check_finite(stacked, "text encoder")

    @contextmanager
    def use_adapters(self, adapters: Sequence[BatchedAdapter], *, compiled: bool = False) -> Iterator[Denoise]:
        """See `Denoiser.use_adapters`.

        Raises:
            AntherError: the network can't run with its configuration.
        """
        with super().use_adapters(adapters, compiled=compiled) as denoise:

            def run(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
                with self._wrap_errors(self.family.network):
                    return denoise(x, t, context)

            yield run

    def _check_finite(self, encoded: Tensor, part: str) -> Tensor:
        """Return the output of a part if it is finite; that of a copy that overflowed in half precision isn't."""
        if not encoded.isfinite().all():
            raise AntherError(f"base {self.folder}: its {part} outputs numbers that are not finite: get another copy")
        return encoded

    @contextmanager
    def _wrap_errors(self, part: str) -> Iterator[None]:
        """Convert any error of a loaded part to a one-line AntherError: its configuration may not fit its weights."""
        try:
            yield
        except (AntherError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the libraries raise many kinds
            raise AntherError(
                f"base {self.folder}: its {part} can't be run ({summary(error)}): copy it again"
            ) from error

    def encode_guidance(self, captions: Sequence[str], strength: float) -> Guidance:
        """Encode captions for generation with this guidance scale; 1 means no guidance.

        Args:
            captions: one per image.
            strength: guidance scale.

        Returns:
            For a network that embeds the scale, a context that contains it; otherwise the contexts of two passes.
        """
        if self.family.guide is not None:
            return Guidance(self.family.guide(self.encode_captions(captions), strength), None, 1.0)
        context = self.encode_captions([*captions, None])
        return Guidance(context[:-1], context[-1], strength)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, small: Path | None = None, tile: int | None = None) -> np.ndarray:
        """Decode scaled latents [n, c, h, w] to uint8 images, [n, H, W] for a gray base and [n, H, W, 3] otherwise.

        Args:
            latents: scaled as by `encode_images`.
            small: folder of a distilled VAE that replaces the base's own decoder.
            tile: side in pixels of tiles that are decoded one after another; None: whole images.
        """
        vae: Any = (decoding.small_vae(small) if small else self._checkpoint.load("vae")).to(self.device)
        if tile:
            decoding.in_tiles(vae, tile, self._checkpoint.scale)
        shift, scale = _statistics(vae, latents)
        latents = latents / scale + shift
        with self._wrap_errors("vae"):
            pixels = torch.cat([vae.decode(part).sample for part in latents.split(self._vae_batch(64))])
        pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        return (pixels[:, 0] if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1)).numpy()

    def _vae_batch(self, small: int) -> int:
        """Return the number of images per VAE pass: `small` at 64 × 64 pixels, and fewer for larger images, by area."""
        return max(1, min(small, small * 64**2 // self.resolution**2))

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """Convert an image to the base's input: gray or color as its VAE, center-cropped to its resolution.

        Args:
            image: uint8 [H, W] or [H, W, 3], of any size.

        Returns:
            uint8 [resolution, resolution] for a gray base, [resolution, resolution, 3] otherwise.
        """
        from PIL import Image, ImageOps

        picture = Image.fromarray(image).convert("L" if self._gray else "RGB")
        return np.array(ImageOps.fit(picture, (self.resolution, self.resolution), Image.Resampling.LANCZOS))


def load(path: str, *, sites: str | None = None, device: str = "cpu", **options: Any) -> Base:
    """Load the base of this name, hash, or folder.

    Args:
        path: see `models.files.assets.locate`.
        sites: see `Base`.
        device: torch device, or 'auto'.
        options: further arguments of `Base`.

    Raises:
        AntherError: the base is missing or not supported.
    """
    return Base(assets.locate(path), sites=sites, device=resolve_device(device), **options)


def resolve_device(device: str) -> str:
    """Return the torch device of this name; for 'auto', a GPU if there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _latents(encoded: Any) -> Tensor:
    """Return a VAE encoder's output: the mode of its distribution, or the latents themselves."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return the shift and scale of a VAE's latents: scaled = (latents − shift) · scale."""
    config = vae.config
    if config.get("latents_mean") is None:
        return config.get("shift_factor") or 0.0, config.scaling_factor
    mean, deviation = (torch.tensor(config[key]).to(like).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
    return mean, config.scaling_factor / deviation
