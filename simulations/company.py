"""Does what a picture adds to a sum depend on the other pictures? On a real network, whose float32 rounding may.

Kernels of a layer differ with the size of a pass, in the last bits of what they compute. Under an adapter that makes
the network chaotic those bits grow to all of a gradient, so that one picture more could move the sum by several clips.
A search among adapters within `models.bounds.MOST_NORM` found one under which it does in passes of any size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.adapter import Adapter, Factors, initial
from models.base import Base
from models.denoiser import Denoiser
from privacy.goodness_of_fit import Check
from privacy.noise import Secure
from simulations.canaries import Silent
from training.jobs import DPSGD, Examples, Train
from training.trainer import train

SIZES = (2, 3, 4, 15, 16)  # kernels change from 1 to 2, 3 to 4 and 15 to 16
CLIP = 2.0**-7
_RATE = 2.0**10  # so that the start of the adapter takes no digits of the sum
_SEED, _RANK, _NORM = 601139390, 4, 99.0  # what the search found
TOLERANCE = 1e-4
"""In units of the clip: what float32 adapters round."""


def chaotic(base: Denoiser, rank: int = 8) -> Adapter:
    """An adapter of this rank, each site's product of Frobenius norm 99, under which the base is chaotic."""
    generator = torch.Generator().manual_seed(_SEED)
    found = {}
    for name, factors in initial(base.sites, rank, _SEED).items():
        a, b = torch.zeros_like(factors.a), torch.zeros_like(factors.b)
        a[:_RANK] = torch.randn(_RANK, *a.shape[1:], generator=generator)
        b[:, :_RANK] = torch.randn(len(b), _RANK, generator=generator)
        scale = (_NORM / torch.linalg.norm(b @ a.flatten(1))).sqrt()
        found[name] = Factors(a * scale, b * scale)
    return found


def shift(base: Denoiser, adapter: Adapter, examples: Examples, *, memory: int) -> float:
    """The largest ‖sum of n − Σ what each adds alone‖ / C over several n, of clipped gradients without noise.

    Args:
        examples: as many as the largest of `SIZES`.
    """
    most = max(SIZES)
    every = [slice(place, place + 1) for place in range(most)] + [slice(0, size) for size in SIZES]
    jobs = [_job(adapter, Examples(*(part[chosen] for part in examples)), chosen.start) for chosen in every]
    sums = []
    for outcome in train(base, jobs, memory=memory, timesteps=1):
        if isinstance(outcome, Exception):
            raise outcome
        sums.append(_moved(adapter, outcome.adapter))
    alone, together = torch.stack(sums[:most]), sums[most:]
    moved = [torch.linalg.vector_norm(sum_ - alone[:size].sum(0)) for size, sum_ in zip(SIZES, together, strict=True)]
    return float(max(moved)) / CLIP


def random_examples(base: Base) -> Examples:
    """Latents of noise under one caption: what makes gradients chaotic is the adapter, not the pictures."""
    latents = torch.randn(max(SIZES), *base.shape, generator=torch.Generator().manual_seed(_SEED))
    return Examples(latents, base.encode_captions([""]).cpu().expand(max(SIZES), -1, -1))


def check(moved: float) -> Check:
    """A shift as a test: of arithmetic that depends on nobody else there is none."""
    return Check("company", 1.0 if moved <= TOLERANCE else 0.0, f"a picture moves what others add by {moved:.2g} C")


def _job(adapter: Adapter, examples: Examples, first: int) -> Train:
    return Train(
        client="device", round=1, purpose="shared", seed=0, examples=examples, start=adapter, steps=1,
        batch_size=max(SIZES), learning_rate=_RATE, optimiser="sgd", noise=Silent(Secure()),
        names=tuple(f"picture {first + place}" for place in range(len(examples))),
        privacy=DPSGD(noise_multiplier=1.0, clip=CLIP, sampling_rate=1.0),
    )  # fmt: skip


def _moved(start: Adapter, end: Adapter) -> Tensor:
    """The sum that the step was made of [D]."""
    parts = [before - after for name in start for before, after in zip(start[name], end[name], strict=True)]
    return torch.cat([part.double().flatten() for part in parts]) * (max(SIZES) / _RATE)
