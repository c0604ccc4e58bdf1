"""What each client sees at each step: its own random streams, whoever it shares a pass with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.objective import stratified_timesteps
from privacy.noise import stream
from training.jobs import Train


class Batch(NamedTuple):
    """`draws` entries for each of the step's pictures, a picture's draws side by side."""

    pictures: Tensor  # [m] indices into the job's examples; may be empty under DP
    t: Tensor  # [m · draws]
    noise: Tensor  # [m · draws, c, h, w]


class Batches:
    """The stream of one job's batches."""

    def __init__(self, job: Train, schedule_length: int) -> None:
        self._job, self._length = job, schedule_length
        self._shape = job.examples.latents.shape[1:]
        self._key = (job.seed, job.client, job.round, job.purpose)
        self._generator = torch.Generator().manual_seed(stream(*self._key))
        self._queue = torch.empty(0, dtype=torch.long)
        self._step = 0

    def next(self) -> Batch:
        """The next step's batch."""
        self._step += 1
        return self._poisson() if self._job.privacy else self._shuffled()

    def _shuffled(self) -> Batch:
        """The next pictures of an endless run of shuffles; timesteps stratified over the batch."""
        size = self._job.batch_size
        while len(self._queue) < size:
            shuffle = torch.randperm(len(self._job.examples), generator=self._generator)
            self._queue = torch.cat([self._queue, shuffle])
        pictures, self._queue = self._queue[:size], self._queue[size:]
        t = stratified_timesteps(size, self._length, self._generator)
        return Batch(pictures, t, torch.randn(size, *self._shape, generator=self._generator))

    def _poisson(self) -> Batch:
        """A Poisson batch. A picture's (t, ε) are keyed by what it shows, so that they depend on no other picture.

        Keyed by its place they would shift when an earlier picture is taken away, and more than one gradient change.
        """
        privacy, noise = self._job.privacy, self._job.noise
        assert privacy
        assert noise
        pictures = noise.poisson_batch(len(self._job.examples), privacy.sampling_rate)
        times, noises = [torch.empty(0, dtype=torch.long)], [torch.empty(0, *self._shape)]
        for picture in pictures.tolist():
            generator = torch.Generator().manual_seed(stream(*self._key, self._step, self._job.names[picture]))
            times.append(stratified_timesteps(privacy.draws, self._length, generator))
            noises.append(torch.randn(privacy.draws, *self._shape, generator=generator))
        return Batch(pictures, torch.cat(times), torch.cat(noises))
