"""What a client may ask of whoever drives it: encode pictures, train an adapter, measure one, on all or on each.

A job is plain data. Drivers collect the jobs of many clients and run each kind together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from models.lora.adapter import Adapter
from privacy.noise import NoiseSource


class Picture:
    """One picture, uint8 [H, W] gray or [H, W, 3] color, and its caption.

    This one holds its pixels. One that reads them from a file when they are asked for overrides all but the caption.
    """

    __slots__ = ("_pixels", "caption")

    def __init__(self, pixels: np.ndarray, caption: str) -> None:
        self._pixels, self.caption = pixels, caption

    @property
    def pixels(self) -> np.ndarray:
        """All pixels."""
        return self._pixels

    def at_least(self, side: int) -> np.ndarray:
        """The pixels, or a smaller copy good enough for any use at `side` pixels."""
        del side
        return self.pixels

    def content(self) -> Iterator[bytes]:
        """Bytes that are others for any change of what the picture shows or its caption."""
        yield repr((self.pixels.shape, len(self.caption.encode()), self.caption)).encode()
        yield np.ascontiguousarray(self.pixels).tobytes()


class Examples(NamedTuple):
    """Pictures as the denoiser sees them; cached once, so that the encoders can be freed."""

    latents: Tensor  # [n, c, h, w], scaled as the base's scheduler expects
    context: Tensor  # [n, tokens, d] text embeddings

    def __len__(self) -> int:
        return self.latents.shape[0]


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Turn pictures into Examples with the base's VAE and text encoder. Result: Examples."""

    pictures: Sequence[Picture]


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """DP-SGD with Poisson batches (Abadi et al., 2016, arXiv:1607.00133, algorithm 1)."""

    noise_multiplier: float  # σ
    clip: float  # C
    sampling_rate: float  # q
    draws: int = 1  # (t, ε) draws per picture, averaged before the clip: noise multiplicity
    per_site: bool = False  # clip the gradient of each site to C / √sites instead of the whole to C


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Keep the adapter that is best on validation examples; never in a private job."""

    validation: Examples
    every: int  # steps between two looks
    patience: int  # looks without improvement before the job ends


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Prior preservation (Ruiz et al., 2023, arXiv:2208.12242, eq. 2): what the base makes of the class.

    Every draw of a picture has a partner from these, public ones, whose loss is added `weight`-fold, before the clip.
    """

    examples: Examples
    weight: float = 1.0


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """Whoever asked for a job has no use for it any more."""


def never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Train one adapter of one client on its examples. Result: Trained."""

    client: str
    round: int
    purpose: str  # 'shared' | 'personal' | 'local': keys the random streams
    seed: int  # of the ordinary stream: timesteps, diffusion noise, non-private batches
    examples: Examples
    start: Adapter  # where the trained adapter starts, at the sites that are trained
    trains: str = "both"  # 'both' | 'a' | 'b' | 'cores': what of it is trained (`models.lora.trainable`)
    frozen: Adapter | None = None  # adapter underneath it, not trained
    lora_xs_bases: Adapter | None = None  # with cores: A and orthonormal L that stay, of each B = L C only C is trained
    steps: int
    batch_size: int  # under DP the public constant that the noised sum is divided by
    learning_rate: float
    optimizer: str = "adamw"  # or 'sgd'
    proximal: float = 0.0  # μ of FedProx: its term μ (w − w_start) is added to the gradient
    correction: Adapter | None = None  # SCAFFOLD's c − c_i, added to the gradient, laid out as `start` is
    early_stopping: EarlyStopping | None = None
    privacy: DPSGD | None = None
    noise: NoiseSource | None = None  # DP noise and Poisson batches; required with privacy
    names: tuple[str, ...] = ()  # one for each picture, by what it shows and nothing else; required with privacy
    views: int = 1  # augmentation multiplicity: examples in a row that show one picture; its draws go through them
    prior: Prior | None = None
    cancelled: Callable[[], bool] = never  # asked between passes

    def __post_init__(self) -> None:
        if self.views < 1 or len(self.examples) % self.views:
            raise ValueError(f"client {self.client}: {len(self.examples)} examples are not views={self.views} each")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"client {self.client}: optimiser={self.optimizer!r}, must be adamw or sgd")
        if not 0 <= self.proximal < math.inf:
            raise ValueError(f"client {self.client}: proximal={self.proximal}, must be 0 or more")
        if self.privacy and self.noise is None:
            raise ValueError(f"client {self.client}: a private job needs a noise source")
        if self.privacy and len(self.names) != self.pictures:
            raise ValueError(f"client {self.client}: a private job needs a name for each picture")
        if (self.trains == "cores") != (self.lora_xs_bases is not None):
            raise ValueError(f"client {self.client}: cores are trained in a frame, and nothing else is")
        if self.prior and not len(self.prior.examples):
            raise ValueError(f"client {self.client}: prior preservation needs examples")
        if self.privacy and self.early_stopping:
            raise ValueError(f"client {self.client}: early stopping looks at the pictures, so a private job can't")

    @property
    def fixed_factors(self) -> Adapter | None:
        """What stays of the trained adapter, where a part alone is trained."""
        return self.start if self.trains in ("a", "b") else self.lora_xs_bases

    @property
    def fixed_key(self) -> tuple[object, ...]:
        """What stays of the trained adapter, tensor by tensor: jobs that agree in it have one rank at each site."""
        match self.trains:
            case "a":
                return ("a", *((name, id(factors.b)) for name, factors in self.start.items()))
            case "b":
                return ("b", *((name, id(factors.a)) for name, factors in self.start.items()))
            case "cores":
                return ("cores", id(self.lora_xs_bases), *self.start)
        return ()

    @property
    def clips_per_site(self) -> bool:
        """Whether it is private, and its gradients are clipped site by site."""
        return bool(self.privacy and self.privacy.per_site)

    @property
    def pictures(self) -> int:
        """How many pictures the examples show."""
        return len(self.examples) // self.views

    @property
    def assumed_pictures(self) -> int:
        """N, the pictures that the plan assumes: batch_size / q under DP, as many as there are without it.

        Under DP the size of a pass, memory and time follow from N, which is public, and never from `pictures`.
        """
        if self.privacy is None or not self.privacy.sampling_rate:
            return self.pictures
        return assumed_pictures(self.batch_size, self.privacy.sampling_rate)

    @property
    def unit(self) -> int:
        """Entries of what is clipped: under DP the draws of a picture with their partners of the prior; else 1."""
        return (self.privacy.draws if self.privacy else 1) * (2 if self.privacy and self.prior else 1)


def assumed_pictures(batch_size: int, sampling_rate: float) -> int:
    """N, the pictures that a plan with Poisson batches assumes: its q is batch_size / N."""
    return max(1, round(batch_size / sampling_rate))


class TrainedAdapter(NamedTuple):
    """The trained adapter (the best on validation, where that was asked for)."""

    adapter: Adapter
    loss: float  # mean training loss over all steps; NaN if no example was seen
    steps: int  # steps actually taken
    idle: float = 0.0  # seconds that are left of a private job's public time, if it had the device for itself


@dataclass(frozen=True, kw_only=True)
class MeasureJob:
    """Mean denoising loss of an adapter on examples, at fixed timesteps and noise. Result: float."""

    examples: Examples
    adapter: Adapter | None  # None: the base alone


@dataclass(frozen=True, kw_only=True)
class MeasureEachJob:
    """Denoising loss of every example by itself. Result: Tensor float64 [n].

    All are seen at the same timesteps with the same noise, in passes of their own: the loss of one is the same, to the
    last bit, whichever others there are. That is what the sensitivity of a noised gain rests on.
    """

    examples: Examples
    adapter: Adapter | None  # None: the base alone


@dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """A picture of each caption in a few steps, under adapters on top of each other. Result: Drawn."""

    captions: Sequence[str]
    adapters: Sequence[Adapter]
    seed: int
    steps: int


class GeneratedImages(NamedTuple):
    """What was drawn."""

    pictures: np.ndarray  # uint8 [n, H, W], or [n, H, W, 3] in colour


Job = EncodeJob | TrainJob | MeasureJob | MeasureEachJob | GenerateJob
Result = Examples | TrainedAdapter | float | Tensor | GeneratedImages
