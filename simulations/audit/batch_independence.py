"""Test whether a picture's contribution to a sum depends on the other pictures, on a real network in float32.

Kernels of a layer vary with the size of a pass, and so do the last bits of their results. Under an adapter that makes
the network chaotic, those bits grow to the size of the gradient, so that one more picture could move the sum by several
clips. A search among adapters within `models.lora.norm_bound.MAX_NORM` found an adapter for which this happens if
passes have arbitrary sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.base.base import Base
from models.diffusion.denoiser import Denoiser
from models.lora.adapter import Adapter, Factors, init_adapter
from privacy.audit.goodness_of_fit import Check
from privacy.noise import SecureNoise
from simulations.audit.canaries import ZeroNoise
from training.cohort import train
from training.jobs import DPSGD, Examples, TrainJob

SIZES = (2, 3, 4, 15, 16)  # kernels change from 1 to 2, 3 to 4 and 15 to 16
CLIP = 2.0**-7
_RATE = 2.0**10  # large enough that adding the adapter's start costs no digits of the sum
_SEED, _RANK, _NORM = 601139390, 4, 99.0  # result of the search
TOLERANCE = 1e-4
"""Rounding error of float32 adapters, in units of the clip."""


def chaotic_adapter(base: Denoiser, rank: int = 8) -> Adapter:
    """Create an adapter under which the base is chaotic; each site's product has Frobenius norm 99."""
    generator = torch.Generator().manual_seed(_SEED)
    adapter = {}
    for name, factors in init_adapter(base.sites, rank, _SEED).items():
        a, b = torch.zeros_like(factors.a), torch.zeros_like(factors.b)
        a[:_RANK] = torch.randn(_RANK, *a.shape[1:], generator=generator)
        b[:, :_RANK] = torch.randn(len(b), _RANK, generator=generator)
        scale = (_NORM / torch.linalg.norm(b @ a.flatten(1))).sqrt()
        adapter[name] = Factors(a * scale, b * scale)
    return adapter


def max_shift(base: Denoiser, adapter: Adapter, examples: Examples, *, memory: int) -> float:
    """Return the largest ‖sum over n pictures − Σ single-picture sums‖ / C over several n, clipped and without noise.

    Args:
        base: network to test.
        adapter: adapter to train from.
        examples: examples, as many as the largest of `SIZES`.
        memory: bytes that jobs may take.
    """
    count = max(SIZES)
    slices = [slice(index, index + 1) for index in range(count)] + [slice(0, size) for size in SIZES]
    jobs = [_make_job(adapter, Examples(*(part[span] for part in examples)), span.start) for span in slices]
    sums = []
    for outcome in train(base, jobs, memory=memory, timesteps=1):
        if isinstance(outcome, Exception):
            raise outcome
        sums.append(_recover_sum(adapter, outcome.adapter))
    single, joint = torch.stack(sums[:count]), sums[count:]
    shifts = [torch.linalg.vector_norm(sum_ - single[:size].sum(0)) for size, sum_ in zip(SIZES, joint, strict=True)]
    return float(max(shifts)) / CLIP


def random_examples(base: Base) -> Examples:
    """Create latents of noise with one caption: the adapter makes gradients chaotic, not the pictures."""
    latents = torch.randn(max(SIZES), *base.shape, generator=torch.Generator().manual_seed(_SEED))
    return Examples(latents, base.encode_captions([""]).cpu().expand(max(SIZES), -1, -1))


def check(moved: float) -> Check:
    """Express a shift as a test: it is zero if the arithmetic for one picture doesn't depend on the others."""
    return Check("company", 1.0 if moved <= TOLERANCE else 0.0, f"a picture moves what others add by {moved:.2g} C")


def _make_job(adapter: Adapter, examples: Examples, first: int) -> TrainJob:
    return TrainJob(
        client="device",
        round=1,
        purpose="shared",
        seed=0,
        examples=examples,
        start=adapter,
        steps=1,
        batch_size=max(SIZES),
        learning_rate=_RATE,
        optimizer="sgd",
        noise=ZeroNoise(SecureNoise()),
        names=tuple(f"picture {first + index}" for index in range(len(examples))),
        privacy=DPSGD(noise_multiplier=1.0, clip=CLIP, sampling_rate=1.0),
    )


def _recover_sum(start: Adapter, end: Adapter) -> Tensor:
    """Recover the sum [D] that the optimizer step applied."""
    parts = [before - after for name in start for before, after in zip(start[name], end[name], strict=True)]
    return torch.cat([part.double().flatten() for part in parts]) * (max(SIZES) / _RATE)
