"""Canaries in the real training loop: pictures whose gradient is known, independently of the diffusion noise.

The base of the audit has one site and predicts B A c from an example's context c. A is the identity and B = 0. The
schedule has no signal (ᾱ = 0, so that the target is −x_0), and c and x_0 each point along one axis. The gradient of a
canary is then one number of B: all canaries are orthogonal, and each is far longer than the clip, which is the worst
case under clipping.

All code that the claim covers is the real one: `training.cohort.train` with its Poisson batches, draws, clip, sums
over shared passes, noise and AdamW. A round is one step, so that the adversary sees every noised iterate, as a server
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.diffusion.denoiser import Denoiser
from models.diffusion.objective import diffusion
from models.lora.adapter import Adapter, Factors
from privacy.accounting import PoissonGaussian
from privacy.audit.empirical import log_likelihood_ratio, summed
from privacy.noise import CPU, NoiseSource
from training.jobs import DPSGD, Examples, TrainedAdapter, TrainJob

SITE = "canaries.0"
LENGTH = 100.0  # norm of a canary's gradient, in units of the clip
_EPS = 1e-8  # AdamW's ε

Sources = Callable[[str, int], NoiseSource]
"""(device, round) -> source of its noise and Poisson batches."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Included canaries, and the claim about the mechanism that trains on them."""

    claim: PoissonGaussian  # over all rounds of one device
    draws: int
    included: np.ndarray  # [m] bool, each true with probability 1/2
    devices: int

    @property
    def divisor(self) -> int:
        """Public divisor of the sums, for the maximum number of pictures of a device."""
        return math.ceil(self.claim.sampling_rate * len(self.included) / self.devices)

    @property
    def clip(self) -> float:
        """Clip, so small that AdamW's first step preserves the size of the gradient."""
        return _EPS * self.divisor

    @property
    def side(self) -> int:
        """Number of rows and columns of B; each canary is one of its numbers."""
        return int(np.ceil(len(self.included) ** 0.5))

    @property
    def owners(self) -> np.ndarray:
        """Device of each canary, if it is included: int [m]."""
        return np.arange(len(self.included)) % self.devices


class _Network(nn.Module):
    """Network that predicts from each site's token of the context only and ignores the noised picture."""

    def __init__(self, side: int, sites: int) -> None:
        super().__init__()
        layers = [nn.Linear(side, side, bias=False) for _ in range(sites)]
        for layer in layers:
            nn.init.zeros_(layer.weight)
        self.canaries = nn.ModuleList(layers)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **_: object) -> tuple[Tensor]:  # noqa: ARG002
        outputs = [layer(encoder_hidden_states[:, number]) for number, layer in enumerate(self.canaries)]
        return (torch.stack(outputs, dim=1).view_as(x),)


class ZeroNoise:
    """Noise source without noise, with correct Poisson batches: a broken mechanism that an audit must detect."""

    release = False

    def __init__(self, batches: NoiseSource) -> None:
        self._batches = batches

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return self._batches.poisson_batch(size, rate)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:  # noqa: ARG002
        """Return zeros, int64 [size]."""
        return torch.zeros(size, dtype=torch.int64, device=device)


def draw_included(count: int, seed: int) -> np.ndarray:
    """Draw which canaries are included: [count] bool."""
    return np.random.default_rng(seed).random(count) < 0.5


def site(number: int) -> str:
    """Return the name of a site of the canaries' base."""
    return f"canaries.{number}"


def network(side: int, sites: int = 1) -> Denoiser:
    """Build the canaries' base, with `sites` sites of `side` inputs and outputs each."""
    return Denoiser(_Network(side, sites), diffusion(torch.zeros(10), "v_prediction"), sites=r"canaries\.\d+")


class RecordingSource:
    """Noise source that records the batches of another one."""

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
        """See `NoiseSource.rounded_gaussian`."""
        return self.inner.rounded_gaussian(size, stddev, device)


def jobs(experiment: Experiment, sources: Sources) -> list[TrainJob]:
    """Build the jobs of every round of every device, ordered by device and round."""
    claim, side = experiment.claim, experiment.side
    start: Adapter = {SITE: Factors(torch.eye(side), torch.zeros(side, side))}
    all_jobs = []
    for device in range(experiment.devices):
        (canaries,) = np.nonzero(experiment.included & (experiment.owners == device))
        pictures, names = _examples(experiment, canaries), tuple(f"canary {number}" for number in canaries)
        for number in range(claim.steps):
            name = f"device {device}"
            all_jobs.append(
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
    return all_jobs


def canary_releases(experiment: Experiment, outcomes: Sequence[TrainedAdapter | Exception]) -> np.ndarray:
    """Return the releases along each canary's direction, in units of the clip: [devices, rounds, m].

    AdamW's first step is g / (|g| + 10⁻⁸), which is inverted.
    """
    steps = []
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
        steps.append(-outcome.adapter[SITE].b.double().flatten()[: len(experiment.included)])
    step = torch.stack(steps).unflatten(0, (experiment.devices, -1))
    gradient = _EPS * step / (1 - step.abs())
    return (gradient * experiment.divisor / experiment.clip).numpy()


def attacks(experiment: Experiment, releases: np.ndarray) -> dict[str, np.ndarray]:
    """Score the canaries by adversaries who see the releases, or their differences from other releases.

    The differences reveal noise that is shared between devices or rounds; otherwise they are weaker. The likelihood
    ratio is optimal if the noise is as claimed. If there is less noise, the sum is better, since its mean doesn't
    depend on the noise.

    Args:
        experiment: the canaries.
        releases: [devices, rounds, m], result of `canary_releases`.

    Returns:
        Scores [m] by attack.
    """
    devices, _, count = releases.shape
    observed = releases[experiment.owners, :, np.arange(count)].T  # [rounds, m], each on the canary's own device
    scores = {  # stored: the keys name the attack in audit.json
        "own releases": log_likelihood_ratio(observed, experiment.claim),
        "sum of own releases": summed(observed, experiment.claim),
    }
    if devices > 1:
        mean_elsewhere = (releases.sum(0) - observed) / (devices - 1)
        scores["against other devices"] = log_likelihood_ratio(observed - mean_elsewhere, experiment.claim)
    if len(observed) > 1:
        scores["against other rounds"] = log_likelihood_ratio(observed - observed.mean(0), experiment.claim)
    return scores


def residuals(
    experiment: Experiment, releases: np.ndarray, recorded: Sequence[RecordingSource]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Subtract the known contributions from the releases.

    Args:
        experiment: the canaries.
        releases: [devices, rounds, m], result of `canary_releases`.
        recorded: noise sources of the jobs, in the order of `jobs`.

    Returns:
        The residual [m] of each release and the membership [m] of each batch, both over σ.
    """
    noise, joined = [], []
    for device in range(experiment.devices):
        (canaries,) = np.nonzero(experiment.included & (experiment.owners == device))
        for number in range(experiment.claim.steps):
            (batch,) = recorded[device * experiment.claim.steps + number].batches
            member = np.zeros(len(experiment.included))
            member[canaries[batch]] = 1.0
            joined.append(member / experiment.claim.noise_multiplier)
            noise.append(releases[device, number] / experiment.claim.noise_multiplier - joined[-1])
    return noise, joined


def _examples(experiment: Experiment, canaries: np.ndarray) -> Examples:
    side = experiment.side
    row, column = torch.from_numpy(canaries // side), torch.from_numpy(canaries % side)
    # The loss is a mean over `side` numbers, and its gradient is twice the error.
    length = LENGTH * experiment.clip * side / 2
    latents = length * nn.functional.one_hot(row, side).float()
    return Examples(latents[:, None, None], nn.functional.one_hot(column, side).float()[:, None])
