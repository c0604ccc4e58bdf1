"""Batches of one job, and microbatches that hold the entries of many jobs.

A job has its own random streams, independent of the jobs that it shares a pass with. Entries of all clients are packed
into passes, first in, first out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
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
        views, variants = self._job.views, self._job.variants
        examples = pictures * views + self._step % views
        if variants is not None:
            examples = variants.draw(pictures, derive_seed(self._key, "variants", self._step))
        return StepBatch(
            examples=examples,
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


class Microbatch(NamedTuple):
    """The entries [n] of one pass, which form u units of the current steps of c clients."""

    rows: np.ndarray  # [n] row of the entry's client; n may exceed the clients' entries, see `padded`
    examples: np.ndarray  # [n] index into the pooled examples
    phases: np.ndarray  # [n]
    noise_keys: np.ndarray  # [n]
    weights: np.ndarray  # [n]
    unit_sizes: np.ndarray  # [u] number of entries of each unit, which are consecutive
    clients: np.ndarray  # [c] distinct rows, in the order of their units
    units: np.ndarray  # [c] number of units of each client
    entries: np.ndarray  # [c] number of entries of each client
    piece: bool  # whether it is a piece of one unit that is too large for a pass
    last: bool  # whether this piece completes its unit

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.rows)

    @staticmethod
    def zero_weight(row: int, example: int, size: int, unit: int) -> Microbatch:
        """Create a pass of `size` entries with weight 0, which costs as much as any other pass of that size.

        Args:
            row: row of the client.
            example: index of the example that all entries use.
            size: number of entries.
            unit: number of entries of a unit.
        """
        ones = np.ones(size, np.int64)
        sizes = np.full(size // unit, unit) if unit <= size else np.array([size])
        return Microbatch(
            rows=ones * row,
            examples=ones * example,
            phases=ones / 2,
            noise_keys=0 * ones,
            weights=0.0 * ones,
            unit_sizes=sizes,
            clients=ones[:1] * row,
            units=np.array([len(sizes)]),
            entries=np.array([size]),
            piece=unit > size,
            last=True,
        )

    def padded(self, size: int) -> Microbatch:
        """Pad to `size` entries by copies of the first entry with weight 0, whose gradients are zero.

        Padding is counted as whole units, or as part of the piece, of the last client, so that every array after the
        pass has a fixed shape too; `entries` excludes it.

        Raises:
            ValueError: the padding is not a multiple of the unit.
        """
        missing = size - self.size
        per_unit = missing if self.piece else int(self.unit_sizes[0])
        if missing < 0 or (missing and (missing % per_unit or (self.unit_sizes != self.unit_sizes[0]).any())):
            raise ValueError(f"{self.size} entries can't be padded to {size} by whole units of {per_unit}")
        units = self.units.copy()
        if not self.piece:
            units[-1] += missing // per_unit

        def extend(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values, values[:1].repeat(missing)])

        return self._replace(
            rows=extend(self.rows),
            examples=extend(self.examples),
            phases=extend(self.phases),
            noise_keys=extend(self.noise_keys),
            weights=np.concatenate([self.weights, np.zeros(missing)]),
            unit_sizes=self.unit_sizes + missing if self.piece else self.unit_sizes[:1].repeat(size // per_unit),
            units=units,
        )


@dataclass
class _PendingStep:
    """Remaining entries of one client's step."""

    row: int
    batch: StepBatch  # with indices into the pooled examples
    start: int = 0

    @property
    def entries_left(self) -> int:
        return self.batch.size - self.start


class EntryQueue:
    """Entries that wait for a pass."""

    def __init__(self) -> None:
        self._pending: deque[_PendingStep] = deque()
        self._entries = 0

    def __len__(self) -> int:
        return self._entries

    @property
    def unit(self) -> int:
        """Number of entries of the first unit."""
        return self._pending[0].batch.per_unit

    def push(self, row: int, batch: StepBatch) -> None:
        """Append the entries of one client's step, with indices into the pooled examples."""
        if batch.size:
            self._pending.append(_PendingStep(row, batch))
            self._entries += batch.size

    def drop(self, row: int) -> None:
        """Remove a client's entries."""
        self._pending = deque(step for step in self._pending if step.row != row)
        self._entries = sum(step.entries_left for step in self._pending)

    def pop(self, size: int) -> Microbatch:
        """Remove the next entries: at most `size` in whole units, or a piece of one unit that is larger than that."""
        first = self._pending[0]
        unit = first.batch.per_unit
        if unit > size or first.start % unit:
            missing = unit - first.start % unit
            return self._make_microbatch([self._take(min(size, missing))], piece=True, last=missing <= size)
        parts, remaining = [], size
        while self._pending and (
            units := min(remaining, self._pending[0].entries_left) // self._pending[0].batch.per_unit
        ):
            parts.append(self._take(units * self._pending[0].batch.per_unit))
            remaining -= parts[-1][1].size
        return self._make_microbatch(parts, piece=False, last=True)

    def _take(self, entries: int) -> tuple[int, StepBatch]:
        """Remove entries of the first client from the queue, and return them."""
        first = self._pending[0]
        batch = first.batch.part(slice(first.start, first.start + entries))
        first.start += entries
        self._entries -= entries
        if not first.entries_left:
            self._pending.popleft()
        return first.row, batch

    def _make_microbatch(self, parts: list[tuple[int, StepBatch]], *, piece: bool, last: bool) -> Microbatch:
        batches = [batch for _, batch in parts]
        entries = np.array([batch.size for batch in batches])
        clients = np.array([row for row, _ in parts])
        per_unit = entries if piece else np.array([batch.per_unit for batch in batches])
        units = entries // per_unit
        return Microbatch(
            rows=clients.repeat(entries),
            examples=np.concatenate([batch.examples for batch in batches]),
            phases=np.concatenate([batch.phases for batch in batches]),
            noise_keys=np.concatenate([batch.noise_keys for batch in batches]),
            weights=np.concatenate([batch.weights for batch in batches]),
            unit_sizes=per_unit.repeat(units),
            clients=clients,
            units=units,
            entries=entries,
            piece=piece,
            last=last,
        )
