"""What each client sees at each step: its own random streams, whoever it shares a pass with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from common import counter_rng
from common.seeding import derive_seed
from training.jobs import Prior, TrainJob


class StepBatch(NamedTuple):
    """The entries [e] of one step; `per_unit` entries in a row make one unit.

    A unit is what is clipped: under DP one picture, with all its draws and their partners of the prior.
    """

    examples: np.ndarray  # int64: which example; those of the prior count on from the job's own
    phases: np.ndarray  # float64 in [0, 1): the timestep as a share of the schedule
    noise_keys: np.ndarray  # int64: stream of the diffusion noise
    weights: np.ndarray  # float64: share of the entry's loss in its unit
    per_unit: int

    @property
    def size(self) -> int:
        """How many entries."""
        return len(self.examples)

    def part(self, entries: slice) -> StepBatch:
        """Some of the entries."""
        examples, phases, noise_keys, weights, per_unit = self
        return StepBatch(examples[entries], phases[entries], noise_keys[entries], weights[entries], per_unit)


class BatchSampler:
    """The stream of one job's batches."""

    def __init__(self, job: TrainJob) -> None:
        self._job = job
        key = (job.seed, job.client, job.round, job.purpose)
        self._key = derive_seed(*key)
        self._generator = torch.Generator().manual_seed(self._key)
        self._names = np.array([derive_seed(*key, name) for name in job.names], np.int64)
        self._queue = np.empty(0, np.int64)
        self._step = 0

    def next(self) -> StepBatch:
        """The next step's batch; under DP it may be empty."""
        batch = self._poisson() if self._job.privacy else self._shuffled()
        self._step += 1
        return batch if self._job.prior is None else _with_partners(batch, self._job, self._job.prior)

    def _shuffled(self) -> StepBatch:
        """The next pictures of an endless run of shuffles; timesteps stratified over the batch."""
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
        """A Poisson batch; the draws of a picture are stratified over themselves and go through its views in turn.

        A picture's streams are keyed by what it shows, so that they depend on no other picture. Keyed by its place they
        would shift when an earlier picture is taken away, and more than one gradient change. So the (t, ε) need not be
        secret: given the seed of the streams, each picture's clipped gradient is a function of that picture, the
        adapter and the step, and one picture more or less changes the sum by its own gradient alone, C at most. The
        Gaussian mechanism then bounds ε for every seed, and so for any distribution of seeds. What must be secret is
        who joins a batch, and the noise.
        """
        privacy, noise = self._job.privacy, self._job.noise
        assert privacy
        assert noise
        pictures = noise.poisson_batch(self._job.pictures, privacy.sampling_rate).numpy()
        draws, views = privacy.draws, self._job.views
        keys = counter_rng.child(self._names[pictures], self._step).repeat(draws)
        turns = np.tile(np.arange(draws), len(pictures))
        return StepBatch(
            examples=pictures.repeat(draws) * views + (self._step * draws + turns) % views,
            phases=stratified(counter_rng.uniform(keys), turns, draws),
            noise_keys=counter_rng.child(keys, turns),
            weights=np.full(len(turns), 1 / draws),
            per_unit=draws,
        )


def stratified(starts: np.ndarray, places: np.ndarray, strata: int) -> np.ndarray:
    """Phases in [0, 1), each uniform if its start is, and one in each of `strata` equal parts for places 0, 1, ….

    A small batch still sees early and late steps (Kingma et al., 2021, arXiv:2107.00630, appendix I.1).
    """
    return (starts + places / strata) % 1


def _with_partners(batch: StepBatch, job: TrainJob, prior: Prior) -> StepBatch:
    """Each entry followed by its partner: the same timestep, another noise, an example of the prior."""
    partner = counter_rng.child(batch.noise_keys, 0)
    chosen = (partner.view(np.uint64) % np.uint64(len(prior.examples))).astype(np.int64)
    return StepBatch(
        examples=_woven(batch.examples, len(job.examples) + chosen),
        phases=_woven(batch.phases, batch.phases),
        noise_keys=_woven(batch.noise_keys, partner),
        weights=_woven(batch.weights, batch.weights * prior.weight),
        per_unit=2 * batch.per_unit if job.privacy else 1,
    )


def _woven(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Alternately of one and of the other."""
    return np.stack([one, other], axis=1).reshape(-1)
