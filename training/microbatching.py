"""Microbatching: pack the examples of all clients into passes, first in, first out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from training.batches import StepBatch


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
