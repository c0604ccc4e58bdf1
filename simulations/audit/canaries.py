"""Canaries in the real training loop: pictures whose gradient is known, whatever noise the diffusion adds.

The base of the audit has one site and predicts B A c of an example's context c. With A the identity, B = 0, a schedule
without signal (ᾱ = 0, so that the target is −x_0) and c and x_0 along one axis each, the gradient of a canary is one
number of B: all canaries are orthogonal, and each is far longer than the clip, the worst case that the clip allows.

Everything that is claimed about runs for real: `training.cohort.train` with its Poisson batches, draws, clip, packed
sums, noise and AdamW. A round is one step, so that the adversary sees every noised iterate, as the server does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.base.denoiser import Denoiser
from models.diffusion.objective import diffusion
from models.lora.adapter import Adapter, Factors
from privacy.accounting import PoissonGaussian
from privacy.audit.empirical import log_likelihood_ratio, summed
from privacy.noise import CPU, NoiseSource
from training.jobs import DPSGD, Examples, TrainedAdapter, TrainJob

SITE = "canaries.0"
LENGTH = 100.0  # of a canary's gradient, in units of the clip
_EPS = 1e-8  # of AdamW

Sources = Callable[[str, int], NoiseSource]
"""(device, round) -> where its noise and Poisson batches come from."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Which canaries went in, and what is claimed about whoever trains on them."""

    claim: PoissonGaussian  # of all rounds of one device
    draws: int
    included: np.ndarray  # [m] bool, each true with probability 1/2
    devices: int

    @property
    def divisor(self) -> int:
        """The public constant, for as many pictures as a device could have."""
        return math.ceil(self.claim.sampling_rate * len(self.included) / self.devices)

    @property
    def clip(self) -> float:
        """So small that AdamW's first step keeps the size of what it is told."""
        return _EPS * self.divisor

    @property
    def side(self) -> int:
        """Canaries are the numbers of a matrix B of so many rows and columns."""
        return int(np.ceil(len(self.included) ** 0.5))

    @property
    def owners(self) -> np.ndarray:
        """[m], the device that each canary is on, if it is on any."""
        return np.arange(len(self.included)) % self.devices


class _Network(nn.Module):
    """Predicts what each of its sites makes of its token of the context, whatever the noised picture."""

    def __init__(self, side: int, sites: int) -> None:
        super().__init__()
        layers = [nn.Linear(side, side, bias=False) for _ in range(sites)]
        for layer in layers:
            nn.init.zeros_(layer.weight)
        self.canaries = nn.ModuleList(layers)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **_: object) -> tuple[Tensor]:  # noqa: ARG002
        found = [layer(encoder_hidden_states[:, number]) for number, layer in enumerate(self.canaries)]
        return (torch.stack(found, dim=1).view_as(x),)


class ZeroNoise:
    """No noise at all, on batches as they should be: what an audit must not let pass."""

    release = False

    def __init__(self, batches: NoiseSource) -> None:
        self._batches = batches

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return self._batches.poisson_batch(size, rate)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:  # noqa: ARG002
        return torch.zeros(size, dtype=torch.int64, device=device)


def draw_included(count: int, seed: int) -> np.ndarray:
    """Which canaries go in: [count] bool."""
    return np.random.default_rng(seed).random(count) < 0.5


def site(number: int) -> str:
    """Name of one of the sites of the canaries' base."""
    return f"canaries.{number}"


def network(side: int, sites: int = 1) -> Denoiser:
    """The base that the canaries are made for, with so many sites of `side` inputs and outputs."""
    return Denoiser(_Network(side, sites), diffusion(torch.zeros(10), "v_prediction"), sites=r"canaries\.\d+")


class RecordingSource:
    """A noise source, and the batches that it gave."""

    def __init__(self, inner: NoiseSource) -> None:
        self.inner = inner
        self.batches: list[np.ndarray] = []

    @property
    def release(self) -> bool:
        return self.inner.release

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        batch = self.inner.poisson_batch(size, rate)
        self.batches.append(batch.numpy().copy())
        return batch

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        return self.inner.rounded_gaussian(size, stddev, device)


def jobs(experiment: Experiment, sources: Sources) -> list[TrainJob]:
    """Every round of every device, device by device."""
    claim, side = experiment.claim, experiment.side
    start: Adapter = {SITE: Factors(torch.eye(side), torch.zeros(side, side))}
    found = []
    for device in range(experiment.devices):
        (chosen,) = np.nonzero(experiment.included & (experiment.owners == device))
        pictures, names = _examples(experiment, chosen), tuple(f"canary {number}" for number in chosen)
        for number in range(claim.steps):
            name = f"device {device}"
            found.append(
                TrainJob(
                    client=name,
                    round=number,
                    purpose="shared",
                    seed=0,
                    examples=pictures,
                    start=start,
                    steps=1,
                    batch_size=experiment.divisor,
                    learning_rate=1.0,
                    names=names,
                    noise=sources(name, number),
                    privacy=DPSGD(
                        noise_multiplier=claim.noise_multiplier,
                        clip=experiment.clip,
                        sampling_rate=claim.sampling_rate,
                        draws=experiment.draws,
                    ),
                )
            )
    return found


def seen(experiment: Experiment, outcomes: Sequence[TrainedAdapter | Exception]) -> np.ndarray:
    """What was released along each canary's direction, in units of the clip: [devices, rounds, m].

    AdamW's first step is g / (|g| + 10⁻⁸), which is undone.
    """
    steps = []
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
        steps.append(-outcome.adapter[SITE].b.double().flatten()[: len(experiment.included)])
    step = torch.stack(steps).unflatten(0, (experiment.devices, -1))
    gradient = _EPS * step / (1 - step.abs())
    return (gradient * experiment.divisor / experiment.clip).numpy()


def attacks(experiment: Experiment, seen: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [m] of the canaries by adversaries who look at releases alone, or at how they differ from others.

    The differences find noise that is the same for several devices, or in several rounds; if none is, they see less.
    The likelihood ratio is best if the noise is as claimed; if it is less, the sum is, whose mean doesn't depend on it.
    """
    devices, _, count = seen.shape
    own = seen[experiment.owners, :, np.arange(count)].T  # [rounds, m]
    found = {
        "own releases": log_likelihood_ratio(own, experiment.claim),
        "sum of own releases": summed(own, experiment.claim),
    }
    if devices > 1:
        others = (seen.sum(0) - own) / (devices - 1)
        found["against other devices"] = log_likelihood_ratio(own - others, experiment.claim)
    if len(own) > 1:
        found["against other rounds"] = log_likelihood_ratio(own - own.mean(0), experiment.claim)
    return found


def residuals(
    experiment: Experiment, seen: np.ndarray, recorded: Sequence[RecordingSource]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What is left of each release [m] without what is known to be in it, over σ; and who joined [m], over σ."""
    noise, joined = [], []
    for device in range(experiment.devices):
        (chosen,) = np.nonzero(experiment.included & (experiment.owners == device))
        for number in range(experiment.claim.steps):
            (batch,) = recorded[device * experiment.claim.steps + number].batches
            member = np.zeros(len(experiment.included))
            member[chosen[batch]] = 1.0
            joined.append(member / experiment.claim.noise_multiplier)
            noise.append(seen[device, number] / experiment.claim.noise_multiplier - joined[-1])
    return noise, joined


def _examples(experiment: Experiment, chosen: np.ndarray) -> Examples:
    side = experiment.side
    row, column = torch.from_numpy(chosen // side), torch.from_numpy(chosen % side)
    length = (
        LENGTH * experiment.clip * side / 2
    )  # the loss is a mean over `side` numbers, its gradient twice that of one
    latents = length * nn.functional.one_hot(row, side).float()
    return Examples(latents[:, None, None], nn.functional.one_hot(column, side).float()[:, None])
