"""The frozen base: a diffusers pipeline in a folder, ready to carry adapters.

The network stays; the VAE and the text encoders are loaded to encode pictures once, and freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import AntherError, summary
from models.base import assets
from models.base.denoiser import Denoise, Denoiser
from models.diffusion import decoding
from models.families.checkpoint import recognize
from models.lora.batched_lora import BatchedAdapter
from models.quantization import packed


class Guidance(NamedTuple):
    """What a picture is drawn under."""

    context: Tensor  # [n, rows, d]
    null: Tensor | None  # [rows, d], what is led away from; None: the network is told the strength
    strength: float  # of two passes


class Base(Denoiser):
    """One frozen base on one torch device, with its encoders at hand.

    Args:
        sites: regular expression on the names of the network's layers; None: its family's own choice.
        resolution: side of a picture in pixels; None: what the network was made for.

    Attributes:
        hash: content hash of the folder; devices prove by it that they hold the same base.
        family: what its architecture decides.
        notes: its family, licence and safety checker, to be carried along with what is made from it.
        shape: latent shape (c, h, w).
        resolution: side of a picture in pixels.
        own_resolution: that which the network was made for; None: its configuration doesn't say.
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
        self._grey = checkpoint.config("vae").get("in_channels", 3) == 1
        channels, side, patch = self.family.latents(checkpoint.config(self.family.network))
        scale = checkpoint.scale
        if resolution is None and side is None:
            raise AntherError(f"base {folder}: its {self.family.network} says no sample_size: give base.resolution")
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
            sites=sites or self.family.sites,
            device=device,
            compute=compute,
            weights=weights,
            checkpointing=checkpointing,
            forward=self.family.forward,
        )

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray], ask: Callable[[], None] = lambda: None) -> Tensor:
        """Scaled latents [n, c, h, w] of uint8 pictures of any size, grey or colour: the mean of the posterior.

        Passes are always of equally many pictures, filled up with the last: the latents of a picture don't depend on
        how many others there are; nor on which, nor on its place among them, to the last bit (tested on CPUs). `ask` is
        called before each pass, and may raise.
        """
        batch = self._at_once(16)
        vae: Any = self._checkpoint.load("vae").to(self.device)
        pixels = torch.from_numpy(np.stack([self.preprocess(image) for image in images])).float() / 127.5 - 1
        pixels = pixels[:, None] if self._grey else pixels.permute(0, 3, 1, 2)
        filled = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % batch, -1, -1, -1)])
        found = []
        for part in filled.split(batch):
            ask()
            with self._running("vae"):
                found.append(_latents(vae.encode(part.to(self.device))))
        latents = torch.cat(found)
        shift, scale = _statistics(vae, latents)
        return self._sound((latents[: len(pixels)] - shift) * scale, "vae")

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str | None], ask: Callable[[], None] = lambda: None) -> Tensor:
        """All that stands for each caption [n, rows, d], as its family packs it; None is what guidance leads away from.

        Captions that repeat are encoded once, each by itself: an embedding doesn't depend on which others there are,
        to the last bit. In one pass together the order of its sums could, and then one picture more would change the
        gradients of others.
        """
        encoders: Any = self._checkpoint.load_encoders().to(self.device)
        distinct = {}
        for caption in dict.fromkeys(captions):
            ask()
            with self._running("text encoder"):
                distinct[caption] = self.family.encode(encoders, caption)
        with self._running("text encoder"):  # captions of several lengths, if its tokenizer doesn't fill them up
            together = torch.stack([distinct[caption] for caption in captions])
        return self._sound(together, "text encoder")

    @contextmanager
    def use_adapters(self, adapters: Sequence[BatchedAdapter], *, compiled: bool = False) -> Iterator[Denoise]:
        """As of a Denoiser.

        Raises:
            AntherError: the network can't be run as its configuration says.
        """
        with super().use_adapters(adapters, compiled=compiled) as denoise:

            def run(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
                with self._running(self.family.network):
                    return denoise(x, t, context)

            yield run

    def _sound(self, encoded: Tensor, part: str) -> Tensor:
        """What a part made, if it is finite: a copy whose half precision overflowed gives none that is."""
        if not encoded.isfinite().all():
            raise AntherError(f"base {self.folder}: its {part} gives numbers that are not finite: get another copy")
        return encoded

    @contextmanager
    def _running(self, part: str) -> Iterator[None]:
        """Whatever goes wrong in a part that was loaded, in one line: its configuration is not that of its weights."""
        try:
            yield
        except (AntherError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any kind, from deep within the libraries
            raise AntherError(
                f"base {self.folder}: its {part} can't be run ({summary(error)}): copy it again"
            ) from error

    def encode_guidance(self, captions: Sequence[str], strength: float) -> Guidance:
        """What to draw captions under, so that guidance has this strength; 1 is none."""
        if self.family.guide is not None:
            return Guidance(self.family.guide(self.encode_captions(captions), strength), None, 1.0)
        context = self.encode_captions([*captions, None])
        return Guidance(context[:-1], context[-1], strength)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, small: Path | None = None, tile: int | None = None) -> np.ndarray:
        """Pictures uint8 [n, H, W] (grey base) or [n, H, W, 3] from scaled latents [n, c, h, w].

        Args:
            small: folder of a distilled VAE that decodes in the place of the base's own.
            tile: side of the pieces in pixels that are decoded one after another; None: whole pictures.
        """
        vae: Any = (decoding.small_vae(small) if small else self._checkpoint.load("vae")).to(self.device)
        if tile:
            decoding.in_tiles(vae, tile, self._checkpoint.scale)
        shift, scale = _statistics(vae, latents)
        latents = latents / scale + shift
        with self._running("vae"):
            pixels = torch.cat([vae.decode(part).sample for part in latents.split(self._at_once(64))])
        pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        return (pixels[:, 0] if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1)).numpy()

    def _at_once(self, small: int) -> int:
        """Pictures in one pass of the VAE: of 64 pixels so many, of larger ones fewer in proportion to their area."""
        return max(1, min(small, small * 64**2 // self.resolution**2))

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """A picture as the base sees it, uint8: grey or colour as its VAE, its centre square at its resolution."""
        from PIL import Image, ImageOps

        picture = Image.fromarray(image).convert("L" if self._grey else "RGB")
        return np.array(ImageOps.fit(picture, (self.resolution, self.resolution), Image.Resampling.LANCZOS))


def load(path: str, *, sites: str | None = None, device: str = "cpu", **options: Any) -> Base:
    """The base of that name or folder; `device` may be 'auto', the other options are those of Base.

    Raises:
        AntherError: it is missing or of another kind.
    """
    return Base(assets.locate(path), sites=sites, device=resolve_device(device), **options)


def resolve_device(device: str) -> str:
    """The torch device of that name; of `auto`, a GPU if there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _latents(encoded: Any) -> Tensor:
    """What a VAE's encoder found: the mean of a distribution, or latents themselves."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What is taken from a VAE's latents, and what they are then multiplied by."""
    config = vae.config
    if config.get("latents_mean") is None:
        return config.get("shift_factor") or 0.0, config.scaling_factor
    mean, deviation = (torch.tensor(config[key]).to(like).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
    return mean, config.scaling_factor / deviation
