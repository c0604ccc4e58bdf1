"""Private training with known inputs: subtracting their contributions from a release leaves only the noise.

The canaries of `simulations.audit.canaries` are trained in various situations: several steps per job, several sites,
mixed ranks, either optimizer, mostly empty batches, one very long release. The members of each batch are recorded from
the noise source. Each picture's contribution to a sum is computed by a formula of this module, not by the code under
test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from models.lora.adapter import Adapter, Factors
from privacy.audit import goodness_of_fit as fit
from privacy.audit.goodness_of_fit import Check
from privacy.bounded_sum import RESOLUTION
from privacy.noise import NoiseSource
from simulations.audit.canaries import LENGTH, RecordingSource, Sources, network, site
from training.cohort import train
from training.jobs import DPSGD, Examples, TrainedAdapter, TrainJob

BETA = 0.9  # AdamW's β₁
EPS = 1e-8  # AdamW's ε
_RATE = 2.0**-40  # learning rate: so small that the adapter and the gradients of the canaries don't change
MAX_SIGMA = 2.0**19  # half of a policy's limit, and a power of two, which keeps float32 numbers on a lattice
_LINEAR = 1e-4  # AdamW is linear for gradients up to this many ε


@dataclass(frozen=True, kw_only=True)
class Situation:
    """Number and kind of the jobs: one for each device and round."""

    name: str
    pictures: int  # of each device
    sampling_rate: float
    noise_multiplier: float
    side: int  # inputs and outputs of a site
    devices: int = 1
    rounds: int = 1
    steps: int = 1
    sites: int = 1
    ranks: tuple[int, ...] = ()  # of the devices, repeated cyclically; empty: `side`
    trains: str = "both"
    optimizer: str = "sgd"
    per_site: bool = False
    draws: int = 1

    def rank(self, device: int) -> int:
        return self.ranks[device % len(self.ranks)] if self.ranks else self.side

    @property
    def divisor(self) -> int:
        """Public divisor of the sum: a power of two (so division is exact) that is at least the number of pictures."""
        return int(2 ** math.ceil(math.log2(max(1.0, self.sampling_rate * self.pictures))))

    @property
    def clip(self) -> float:
        """Clip: a power of two for SGD; for AdamW, small enough that AdamW is linear."""
        return 2.0**-7 if self.optimizer == "sgd" else _LINEAR * EPS * self.divisor / self.noise_multiplier

    @property
    def weights(self) -> np.ndarray:
        """Weight of each step's gradient in −1 × the change of the adapter, times ε for AdamW [steps].

        If g ≪ ε, AdamW takes steps of m̂_t / ε, m̂_t = Σ_{i ≤ t} (1 − β) β^(t−i) g_i / (1 − β^t).
        """
        if self.optimizer == "sgd":
            return np.ones(self.steps)
        t, i = np.arange(1, self.steps + 1)[None], np.arange(1, self.steps + 1)[:, None]
        return np.where(i <= t, (1 - BETA) * BETA ** (t - i.astype(float)) / (1 - BETA**t), 0.0).sum(1)


class Observations(NamedTuple):
    """Observations of one situation, as numbers that are standard normal if the mechanism is the claimed one."""

    noise: list[np.ndarray]
    """Residuals of the release, by job."""
    batches: list[np.ndarray]
    """Members of the batches, by job."""
    sizes: np.ndarray
    """Sizes of all batches."""
    joined: list[np.ndarray]
    """Contributions of the pictures that joined, by job, at the positions of `noise`."""
    missed: list[np.ndarray]
    """Contributions of the pictures that did not join, in the same form."""
    steps: list[np.ndarray]
    """Release of each job in grid steps, if the optimizer preserves whole steps."""


def observe(situation: Situation, sources: Sources, seed: int, *, memory: int) -> Observations:
    """Run every job of a situation through `training.cohort.train`, and subtract known contributions from releases.

    Args:
        situation: number and kind of the jobs.
        sources: (device, round) -> noise source.
        seed: seed of dither.
        memory: bytes that jobs may take.
    """
    generator = np.random.default_rng(seed)
    recorded = [
        RecordingSource(sources(f"device {device}", number))
        for device in range(situation.devices)
        for number in range(situation.rounds)
    ]
    jobs = [_job(situation, index, source) for index, source in enumerate(recorded)]
    outcomes = train(network(situation.side, situation.sites), jobs, memory=memory, timesteps=1)
    observed, sizes = Observations([], [], np.empty(0), [], [], []), []
    bound = situation.clip / math.sqrt(situation.sites) if situation.per_site else situation.clip
    step = situation.clip / RESOLUTION
    stddev = situation.noise_multiplier * situation.clip * float(np.sqrt(np.square(situation.weights).sum()))
    for job, source, outcome in zip(jobs, recorded, outcomes, strict=True):
        if isinstance(outcome, Exception):
            raise outcome
        member = np.zeros((situation.steps, situation.pictures), bool)
        for number, batch in enumerate(source.batches):
            member[number, batch] = True
        released, joined, missed = _release(situation, job.start, outcome, member)
        dither = step * (generator.random(released.size) - 0.5)  # whole steps aren't normally distributed
        noise = (released - bound * joined + dither) / stddev
        unseen = np.isnan(released)
        noise[unseen] = generator.standard_normal(int(unseen.sum()))  # so that all other values keep their positions
        observed.noise.append(noise)
        observed.joined.append(bound * joined / stddev)
        observed.missed.append(bound * missed / stddev)
        if situation.optimizer == "sgd":
            observed.steps.append(released[~unseen] / step)
        observed.batches.append(fit.normal_from_membership(member, situation.sampling_rate, generator).ravel())
        sizes.append(member.sum(1))
    all_sizes = np.concatenate(sizes)
    return observed._replace(
        sizes=fit.normal_from_batch_sizes(all_sizes, situation.pictures, situation.sampling_rate, generator)
    )


def checks(observed: Observations) -> list[Check]:
    """Run all tests on the observations of a situation."""
    results = [check._replace(name=f"noise: {check.name}") for check in fit.battery(observed.noise)]
    results.append(fit.alignment(observed.noise, observed.joined, "noise: along pictures that joined"))
    results.append(fit.alignment(observed.noise, observed.missed, "noise: along pictures that did not"))
    if observed.steps:
        all_steps = np.concatenate(observed.steps)
        results += [fit.on_grid(all_steps), fit.residues(np.rint(all_steps))]
        results.append(fit.repeats([np.rint(steps).astype(np.int64) for steps in observed.steps], RESOLUTION / 4))
    if sum(map(len, observed.batches)) > 1:
        results += [check._replace(name=f"batches: {check.name}") for check in fit.battery(observed.batches)]
        results += [fit.distribution(observed.sizes)._replace(name="batch sizes: distribution")]
        results += [fit.variance(observed.sizes)._replace(name="batch sizes: variance")]
    return results


def _job(situation: Situation, index: int, source: NoiseSource) -> TrainJob:
    device, number = divmod(index, situation.rounds)
    rank, side = situation.rank(device), situation.side
    factors = Factors(torch.eye(side)[:rank], torch.zeros(side, rank))
    return TrainJob(
        client=f"device {device}",
        round=number,
        purpose="shared",
        seed=0,
        examples=_examples(situation),
        start={site(number): factors for number in range(situation.sites)},
        trains=situation.trains,
        steps=situation.steps,
        batch_size=situation.divisor,
        learning_rate=_RATE,
        optimizer=situation.optimizer,
        names=tuple(f"canary {number}" for number in range(situation.pictures)),
        noise=source,
        privacy=DPSGD(
            noise_multiplier=situation.noise_multiplier,
            clip=situation.clip,
            sampling_rate=situation.sampling_rate,
            draws=situation.draws,
            per_site=situation.per_site,
        ),
    )


def _positions(situation: Situation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a distinct (site, row, column) for each picture [pictures], in the columns that every rank has."""
    columns = min(situation.ranks, default=situation.side)
    positions, sites = np.divmod(np.arange(situation.pictures), situation.sites)
    row, column = np.divmod(positions, columns)
    return sites, row, column


def _examples(situation: Situation) -> Examples:
    """Build examples with x_0 along one output and c along one input, so that only one number of B has a gradient.

    The loss is a mean over all outputs.
    """
    sites, row, column = _positions(situation)
    shape = (situation.pictures, 1, situation.sites, situation.side)
    latents, context = torch.zeros(shape), torch.zeros(shape[0], *shape[2:])
    index = np.arange(situation.pictures)
    latents[index, 0, sites, row] = LENGTH * situation.clip * situation.sites * situation.side / 2
    context[index, sites, column] = 1.0
    return Examples(latents, context)


def _release(
    situation: Situation, start: Adapter, outcome: TrainedAdapter, member: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one job's release and its known contributions: each [d].

    Args:
        situation: the situation of the job.
        start: adapter before the job.
        outcome: adapter after the job.
        member: [steps, n], whether each picture joined each batch.

    Returns:
        Σ w_t · release_t, in the order in which noise is drawn, NaN where A is one (float32 rounds the release away
        there); the weights of the pictures that joined, at their positions; the weights of those that did not join.
    """
    weights = situation.weights
    scale = situation.divisor / _RATE * (1.0 if situation.optimizer == "sgd" else EPS)
    sites, row, column = _positions(situation)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for number in range(situation.sites):
        before, after = start[site(number)], outcome.adapter[site(number)]
        at_site = sites == number
        joined, missed = np.zeros(before.b.shape), np.zeros(before.b.shape)
        joined[row[at_site], column[at_site]] = weights @ member[:, at_site]
        missed[row[at_site], column[at_site]] = weights @ ~member[:, at_site]
        if situation.trains == "both":
            a = np.where(before.a.numpy() == 0, (before.a - after.a).double().numpy() * scale, np.nan)
            parts.append((a, np.zeros_like(a), np.zeros_like(a)))
        parts.append(((before.b - after.b).double().numpy() * scale, joined, missed))
    released, joined, missed = (np.concatenate([part.ravel() for part in same]) for same in zip(*parts, strict=True))
    return released, joined, missed


def situations(longest: int) -> list[Situation]:
    """List the situations that every audit tests.

    Args:
        longest: numbers in the longest release; noise that repeats after half as many numbers is detected.
    """
    mixed = Situation(
        name="five steps a job, three sites, mixed ranks",
        pictures=60,
        sampling_rate=0.3,
        noise_multiplier=1.0,
        side=24,
        devices=6,
        rounds=10,
        steps=5,
        sites=3,
        ranks=(24, 12, 6),
    )
    return [
        mixed,
        replace(
            mixed, name="the same by AdamW, clipped per site, two draws", optimizer="adamw", per_site=True, draws=2
        ),
        Situation(
            name="three pictures, batches mostly empty",
            pictures=3,
            sampling_rate=0.2,
            noise_multiplier=1.0,
            side=16,
            rounds=400,
        ),
        Situation(
            name="one long release",
            pictures=8,
            sampling_rate=0.5,
            noise_multiplier=0.5,
            side=math.isqrt(longest),
            trains="b",
        ),
    ]


def observe_source(source: NoiseSource, count: int) -> tuple[np.ndarray, list[Check]]:
    """Draw noise of the largest σ that policies allow, and return it as standard normal numbers, with its tests.

    float32 adapters can't represent integers this large, so they are taken from the source itself. Only this test
    detects noise that was rounded before it was scaled: for smaller σ, its lattice is finer than the grid.
    """
    stddev = MAX_SIGMA * RESOLUTION
    integers = source.rounded_gaussian(count, stddev).numpy()
    noise = integers / stddev
    return noise, [*fit.battery([noise]), fit.residues(integers), fit.collisions(integers, stddev)]
