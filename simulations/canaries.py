"""Canaries in the real training loop: pictures whose gradient is known, whatever noise the diffusion adds.

The base of the audit has one site and predicts B A c of an example's context c. With A the identity, B = 0, a schedule
without signal (ᾱ = 0, so that the target is −x_0) and c and x_0 along one axis each, the gradient of a canary is one
number of B: all canaries are orthogonal, and each is far longer than the clip, the worst case that the clip allows.

Everything that is claimed about runs for real: `training.trainer.train` with its Poisson batches, draws, clip, packed
sums, noise and AdamW. A round is one step, so that the adversary sees every noised iterate, as the server does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.adapter import Adapter, Factors
from models.denoiser import Denoiser
from models.objective import diffusion
from privacy import central
from privacy.accounting import PoissonGaussian
from privacy.audit import log_likelihood_ratio
from privacy.central import Gaussian
from privacy.noise import CPU, NoiseSource
from training.jobs import DPSGD, Examples, Train, Trained

SITE = "canaries"
LENGTH = 100.0  # of a canary's gradient, in units of the clip
_EPS = 1e-8  # of AdamW

Sources = Callable[[str, int], NoiseSource]
"""(device, round) -> where its noise and Poisson batches come from."""
Mechanism = Callable[[Tensor], Tensor]
"""Updates [n, d] of the devices of one round -> what the server releases of them [d]."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Which canaries went in, and what is claimed about whoever trains on them."""

    claim: PoissonGaussian  # of all rounds of one device
    clip: float
    draws: int
    included: np.ndarray  # [m] bool, each true with probability 1/2
    devices: int

    @property
    def side(self) -> int:
        """Canaries are the numbers of a matrix B of so many rows and columns."""
        return int(np.ceil(len(self.included) ** 0.5))

    @property
    def owners(self) -> np.ndarray:
        """[m], the device that each canary is on, if it is on any."""
        return np.arange(len(self.included)) % self.devices


class _Network(nn.Module):
    """Predicts what its site makes of the context, whatever the noised picture."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.canaries = nn.Linear(side, side, bias=False)
        nn.init.zeros_(self.canaries.weight)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:  # noqa: ARG002
        return (self.canaries(encoder_hidden_states[:, 0]).view_as(x),)


class Silent:
    """No noise at all, on batches as they should be: what an audit must not let pass."""

    release = False

    def __init__(self, batches: NoiseSource) -> None:
        self._batches = batches

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return self._batches.poisson_batch(size, rate)

    def gaussian(self, size: int, device: torch.device = CPU) -> Tensor:
        return torch.zeros(size, device=device)


def toss(count: int, seed: int) -> np.ndarray:
    """Which canaries go in: [count] bool."""
    return np.random.default_rng(seed).random(count) < 0.5


def network(experiment: Experiment) -> Denoiser:
    """The base that the canaries are made for."""
    return Denoiser(_Network(experiment.side), diffusion(torch.zeros(10), "v_prediction"), sites=SITE)


def jobs(experiment: Experiment, sources: Sources) -> list[Train]:
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
                Train(
                    client=name, round=number, purpose="shared", seed=0, examples=pictures, start=start, steps=1,
                    batch_size=_divisor(experiment), learning_rate=1.0, names=names, noise=sources(name, number),
                    privacy=DPSGD(
                        noise_multiplier=claim.noise_multiplier, clip=experiment.clip,
                        sampling_rate=claim.sampling_rate, draws=experiment.draws,
                    ),
                )
            )  # fmt: skip
    return found


def seen(experiment: Experiment, outcomes: Sequence[Trained | Exception]) -> np.ndarray:
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
    return (gradient * _divisor(experiment) / experiment.clip).numpy()


def attacks(experiment: Experiment, seen: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [m] of the canaries by adversaries who look at releases alone, or at how they differ from others.

    The differences find noise that is the same for several devices, or in several rounds; if none is, they see less.
    """
    devices, _, count = seen.shape
    own = seen[experiment.owners, :, np.arange(count)].T  # [rounds, m]
    found = {"own releases": log_likelihood_ratio(own, experiment.claim)}
    if devices > 1:
        others = (seen.sum(0) - own) / (devices - 1)
        found["against other devices"] = log_likelihood_ratio(own - others, experiment.claim)
    if len(own) > 1:
        found["against other rounds"] = log_likelihood_ratio(own - own.mean(0), experiment.claim)
    return found


class Clients(NamedTuple):
    """What an adversary makes of canary clients."""

    cosines: np.ndarray
    """Of those that were in, with all that was released together: that is what the final model shows."""
    seen: np.ndarray
    """What was released along each one's direction, in units of the clip: [rounds, m]."""


def clients(
    mechanism: Mechanism, included: np.ndarray, *, dimension: int, clip: float, rounds: int, seed: int
) -> Clients:
    """Let the included of [m] canary clients take part in every round (Andrew et al., 2023, arXiv:2302.03098).

    Each has a random direction of its own, nearly orthogonal to all others, and sends it every time, longer than the
    clip.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = nn.functional.normalize(torch.randn(len(included), dimension, generator=generator))
    present = directions[torch.from_numpy(included)]
    released = torch.stack([mechanism(LENGTH * clip * present) for _ in range(rounds)])
    cosines = nn.functional.cosine_similarity(present, released.sum(0, keepdim=True))
    return Clients(cosines.double().numpy(), (released @ directions.T).double().numpy() / clip)


def clip_and_noise(updates: Tensor, *, clip: float, noise_multiplier: float, noise: NoiseSource) -> Tensor:
    """A round of the server's own mechanism on updates [n, d], as the sum that it would divide: [d]."""
    server = Gaussian(noise_multiplier=noise_multiplier, expected=float(len(updates)))
    released = server.release(central.clip_and_sum(updates, clip, updates.shape[1]), noise)
    return (released.mean * server.expected).to(updates)


def _examples(experiment: Experiment, chosen: np.ndarray) -> Examples:
    side = experiment.side
    row, column = torch.from_numpy(chosen // side), torch.from_numpy(chosen % side)
    length = (
        LENGTH * experiment.clip * side / 2
    )  # the loss is a mean over `side` numbers, its gradient twice that of one
    latents = length * nn.functional.one_hot(row, side).float()
    return Examples(latents[:, None, None], nn.functional.one_hot(column, side).float()[:, None])


def _divisor(experiment: Experiment) -> int:
    """A public constant so large that AdamW's first step keeps the size of what it is told."""
    return max(1, round(experiment.clip / _EPS))
