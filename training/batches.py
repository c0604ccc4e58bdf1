"""Batches of one job: its own random streams, independent of the jobs that it shares a pass with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from common import counter_rng
from common.seeding import derive_seed
from privacy.dp_sgd import poisson_sample
from training.jobs import Prior, TrainJob


class StepBatch(NamedTuple):
    """The entries [e] of one step, where `per_unit` consecutive entries form one unit.

    A unit is clipped as a whole: under DP it is one picture with all its draws and their prior partners.
    """

    examples: np.ndarray  # int64: index of the example; prior examples come after the job's own
    phases: np.ndarray  # float64 in [0, 1): timestep as a fraction of the schedule
    noise_keys: np.ndarray  # int64: key of the diffusion noise
    weights: np.ndarray  # float64: weight of the entry's loss in its unit
    per_unit: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.examples)

    def part(self, entries: slice) -> StepBatch:
        """Return a slice of the entries."""
        examples, phases, noise_keys, weights, per_unit = self
        return StepBatch(examples[entries], phases[entries], noise_keys[entries], weights[entries], per_unit)


class BatchSampler:
    """Samples the batches of one job."""

    def __init__(self, job: TrainJob) -> None:
        self._job = job
        key = (job.seed, job.client, job.round, job.purpose)
        self._key = derive_seed(*key)
        self._generator = torch.Generator().manual_seed(self._key)
        self._names = np.array([derive_seed(*key, name) for name in job.names], np.int64)
        self._queue = np.empty(0, np.int64)
        self._step = 0

    def next(self) -> StepBatch:
        """Return the next step's batch, which may be empty under DP."""
        batch = self._poisson() if self._job.privacy else self._shuffled()
        self._step += 1
        return batch if self._job.prior is None else _with_partners(batch, self._job, self._job.prior)

    def _shuffled(self) -> StepBatch:
        """Return the next pictures of an endless sequence of shuffles, with timesteps stratified over the batch."""
        size = self._job.batch_size
        while len(self._queue) < size:
            shuffle = torch.randperm(self._job.pictures, generator=self._generator).numpy()
            self._queue = np.concatenate([self._queue, shuffle])
        pictures, self._queue = self._queue[:size], self._queue[size:]
        key = counter_rng.child(self._key, self._step)
        views = self._job.views
        return StepBatch(
            examples=pictures * views + self._step % views,
            phases=stratified(counter_rng.uniform(key), np.arange(size), size),
            noise_keys=counter_rng.child(key, np.arange(size)),
            weights=np.full(size, 1 / size),
            per_unit=1,
        )

    def _poisson(self) -> StepBatch:
        """Sample a Poisson batch. The draws of a picture have stratified timesteps and cycle through its views.

        A picture's streams are keyed by its content, so that they depend on no other picture. If they were keyed by
        position, they would shift when an earlier picture is removed, and more than one gradient would change. So (t,
        ε) need not be secret: given the seed of the streams, each picture's clipped gradient is a function of that
        picture, the adapter and the step, and adding or removing one picture changes the sum by its own gradient only,
        at most C. The Gaussian mechanism then bounds ε for every seed, and so for any distribution of seeds. Membership
        in a batch and the noise must be secret.
        """
        privacy, noise = self._job.privacy, self._job.noise
        assert privacy
        assert noise
        pictures = poisson_sample(self._job.pictures, privacy.sampling_rate, noise).numpy()
        draws, views = privacy.draws, self._job.views
        keys = counter_rng.child(self._names[pictures], self._step).repeat(draws)
        draw_numbers = np.tile(np.arange(draws), len(pictures))
        return StepBatch(
            examples=pictures.repeat(draws) * views + (self._step * draws + draw_numbers) % views,
            phases=stratified(counter_rng.uniform(keys), draw_numbers, draws),
            noise_keys=counter_rng.child(keys, draw_numbers),
            weights=np.full(len(draw_numbers), 1 / draws),
            per_unit=draws,
        )


def stratified(starts: np.ndarray, places: np.ndarray, strata: int) -> np.ndarray:
    """Return phases in [0, 1) that are each uniform if their start is, with one in each stratum for positions 0, 1, ….

    With stratified timesteps, a small batch covers early and late ones (Kingma et al., 2021, arXiv:2107.00630, appendix
    I.1).

    Args:
        starts: uniform numbers in [0, 1), one per entry [n] or one for all.
        places: position of each entry, 0 to `strata` − 1, [n].
        strata: number of equal parts of [0, 1).

    Returns:
        Phases, float64 [n].
    """
    return (starts + places / strata) % 1


def _with_partners(batch: StepBatch, job: TrainJob, prior: Prior) -> StepBatch:
    """Insert after each entry its partner: an example of the prior, with the same timestep and another noise."""
    partner_keys = counter_rng.child(batch.noise_keys, 0)
    prior_indices = (partner_keys.view(np.uint64) % np.uint64(len(prior.examples))).astype(np.int64)
    return StepBatch(
        examples=_interleave(batch.examples, len(job.examples) + prior_indices),
        phases=_interleave(batch.phases, batch.phases),
        noise_keys=_interleave(batch.noise_keys, partner_keys),
        weights=_interleave(batch.weights, batch.weights * prior.weight),
        per_unit=2 * batch.per_unit if job.privacy else 1,
    )


def _interleave(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Interleave two arrays of equal length."""
    return np.stack([first, second], axis=1).reshape(-1)
