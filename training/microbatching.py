"""Which entries share a pass: those of all waiting jobs in the order asked, whoever they belong to."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from training.batches import StepBatch


class Microbatch(NamedTuple):
    """The entries [n] of one pass, which make u units of the steps of c clients."""

    rows: np.ndarray  # [n] row of the entry's client; n may be more than the clients' entries: see `filled`
    examples: np.ndarray  # [n] index into the pooled examples
    phases: np.ndarray  # [n]
    noise_keys: np.ndarray  # [n]
    weights: np.ndarray  # [n]
    unit_sizes: np.ndarray  # [u] entries of each unit, which lie side by side
    clients: np.ndarray  # [c] distinct rows, in the order of their units
    units: np.ndarray  # [c] units of each client
    entries: np.ndarray  # [c] entries of each client
    piece: bool  # a part of one unit that is too large for a pass
    last: bool  # whether its unit ends with this piece

    @property
    def size(self) -> int:
        """How many entries."""
        return len(self.rows)

    @staticmethod
    def nothing(row: int, example: int, size: int, unit: int) -> Microbatch:
        """A pass of `size` entries of one client's example that all weigh nothing, as large as any other."""
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

    def filled(self, size: int) -> Microbatch:
        """The same with `size` entries: those that are missing are copies of the first, of weight 0.

        Their gradients are zero. In whole units, or in the piece, they are counted as the last client's, so that every
        array after the pass has one shape too; `entries` leaves them out.

        Raises:
            ValueError: what is missing makes no whole units.
        """
        missing = size - self.size
        per_unit = missing if self.piece else int(self.unit_sizes[0])
        if missing < 0 or (missing and (missing % per_unit or (self.unit_sizes != self.unit_sizes[0]).any())):
            raise ValueError(f"{self.size} entries can't be filled up to {size} by whole units of {per_unit}")
        units = self.units.copy()
        if not self.piece:
            units[-1] += missing // per_unit

        def more(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values, values[:1].repeat(missing)])

        return self._replace(
            rows=more(self.rows),
            examples=more(self.examples),
            phases=more(self.phases),
            noise_keys=more(self.noise_keys),
            weights=np.concatenate([self.weights, np.zeros(missing)]),
            unit_sizes=self.unit_sizes + missing if self.piece else self.unit_sizes[:1].repeat(size // per_unit),
            units=units,
        )


@dataclass
class _Waiting:
    """What is left of one client's step."""

    row: int
    batch: StepBatch  # its examples as indices into the pooled ones
    start: int = 0

    @property
    def left(self) -> int:
        return self.batch.size - self.start


class EntryQueue:
    """Entries that wait for a pass."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._entries = 0

    def __len__(self) -> int:
        return self._entries

    @property
    def unit(self) -> int:
        """Entries of the first unit."""
        return self._waiting[0].batch.per_unit

    def push(self, row: int, batch: StepBatch) -> None:
        """Append the entries of one client's step, whose examples are indices into the pooled ones."""
        if batch.size:
            self._waiting.append(_Waiting(row, batch))
            self._entries += batch.size

    def drop(self, row: int) -> None:
        """Forget a client's entries."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.row != row)
        self._entries = sum(waiting.left for waiting in self._waiting)

    def take(self, size: int) -> Microbatch:
        """The next at most `size` entries, in whole units; or a piece of one unit that is larger than that."""
        first = self._waiting[0]
        unit = first.batch.per_unit
        if unit > size or first.start % unit:
            rest = unit - first.start % unit
            return self._pack([self._cut(min(size, rest))], piece=True, last=rest <= size)
        taken, room = [], size
        while self._waiting and (units := min(room, self._waiting[0].left) // self._waiting[0].batch.per_unit):
            taken.append(self._cut(units * self._waiting[0].batch.per_unit))
            room -= taken[-1][1].size
        return self._pack(taken, piece=False, last=True)

    def _cut(self, entries: int) -> tuple[int, StepBatch]:
        """Take so many entries off the first client."""
        first = self._waiting[0]
        batch = first.batch.part(slice(first.start, first.start + entries))
        first.start += entries
        self._entries -= entries
        if not first.left:
            self._waiting.popleft()
        return first.row, batch

    def _pack(self, taken: list[tuple[int, StepBatch]], *, piece: bool, last: bool) -> Microbatch:
        batches = [batch for _, batch in taken]
        entries = np.array([batch.size for batch in batches])
        clients = np.array([row for row, _ in taken])
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
