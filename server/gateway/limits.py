"""Limits on requests: rate and number by device, memory in total."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from conf.serving import Limits
from server.gateway.refusal import LATER, Refusal

HOSTILE = 30.0  # requests that one counts as which no SuperNode of ours sends
PIECE = 0.1  # requests that one for a piece of the base counts as: of a large one there are thousands
COMING = 30.0  # requests that coming or leaving counts as: the server has to ask a node anew each time

SHARE = 0.25  # of the memory for bodies, for those of one key

_FORGOTTEN = 4096  # keys


@dataclass
class _Bucket:
    left: float
    at: float


class Budget:
    """Requests a minute and at once by key, and bytes of bodies that are being read, by key and by all.

    Args:
        settings: the limits.
        clock: seconds, monotonic.
    """

    def __init__(self, settings: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._buckets: dict[str, _Bucket] = {}
        self._working: Counter[str] = Counter()
        self._reading: Counter[str] = Counter()

    def take(self, key: str, amount: float = 1.0) -> None:
        """Count a request of a key's.

        Raises:
            Refusal: the key has no more for now.
        """
        bucket = self._refilled(key)
        if bucket.left <= 0:
            raise Refusal(LATER, "too many requests; try again in a minute")
        bucket.left -= amount

    def punish(self, key: str) -> None:
        """Count a hostile request as many."""
        bucket = self._refilled(key)
        bucket.left = max(bucket.left - HOSTILE, -float(self._settings.requests_per_minute))

    @contextmanager
    def working(self, key: str) -> Iterator[None]:
        """Hold one of the requests that a key may have at once. Refusal if it holds all of them."""
        if self._working[key] >= self._settings.concurrent:
            raise Refusal(LATER, "too many requests at once")
        self._working[key] += 1
        try:
            yield
        finally:
            self._working[key] -= 1
            if not self._working[key]:
                del self._working[key]

    @contextmanager
    def reading(self, key: str, size: int) -> Iterator[None]:
        """Reserve memory for a body of this many bytes.

        Raises:
            Refusal: other bodies take all of it, or the key's own take more than its share and this one isn't alone.
        """
        most, own = self._settings.body_mib * 2**20, self._reading[key]
        if self._reading.total() + size > most or (own and own + size > most * SHARE):
            raise Refusal(LATER, "the server is busy")
        self._reading[key] += size
        try:
            yield
        finally:
            self._reading[key] -= size
            if not self._reading[key]:
                del self._reading[key]

    def _refilled(self, key: str) -> _Bucket:
        most, now = float(self._settings.requests_per_minute), self._clock()
        if len(self._buckets) > _FORGOTTEN:
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if now - bucket.at < 60.0}
        bucket = self._buckets.setdefault(key, _Bucket(most, now))
        bucket.left = min(most, bucket.left + (now - bucket.at) * most / 60.0)
        bucket.at = now
        return bucket
