"""Limits on requests: rate and number by device, memory in total."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from conf.schemas.server import LimitsConfig
from server.gateway.refusal import LATER, RequestRefused

HOSTILE_COST = 30.0  # requests that a hostile one (never sent by our SuperNodes) counts as
PIECE_COST = 0.1  # requests that one for a piece of the base counts as: a large base has thousands
ACTIVATION_COST = 30.0  # requests that coming or leaving counts as: the server must query the node each time

SHARE = 0.25  # largest share of the memory for bodies for one key

_FORGOTTEN = 4096  # keys


@dataclass
class _Bucket:
    left: float
    at: float


class RequestBudget:
    """Limits on requests per minute and concurrent requests by key, and on bytes of bodies by key and in total.

    Args:
        settings: the limits.
        clock: seconds, monotonic.
    """

    def __init__(self, settings: LimitsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._buckets: dict[str, _Bucket] = {}
        self._working: Counter[str] = Counter()
        self._reading: Counter[str] = Counter()

    def count_request(self, key: str, amount: float = 1.0) -> None:
        """Count a request of a key.

        Raises:
            Refusal: the key's rate limit is exhausted for now.
        """
        bucket = self._refilled(key)
        if bucket.left <= 0:
            raise RequestRefused(LATER, "too many requests; try again in a minute")
        bucket.left -= amount

    def penalize(self, key: str) -> None:
        """Count a hostile request as many requests."""
        bucket = self._refilled(key)
        bucket.left = max(bucket.left - HOSTILE_COST, -float(self._settings.requests_per_minute))

    @contextmanager
    def request_slot(self, key: str) -> Iterator[None]:
        """Hold one of the requests that a key may have at once. Refusal if it holds all of them."""
        if self._working[key] >= self._settings.concurrent:
            raise RequestRefused(LATER, "too many requests at once")
        self._working[key] += 1
        try:
            yield
        finally:
            self._working[key] -= 1
            if not self._working[key]:
                del self._working[key]

    @contextmanager
    def reserve_memory(self, key: str, size: int) -> Iterator[None]:
        """Reserve memory for a body of this many bytes.

        Raises:
            Refusal: other bodies use all memory, or this body would exceed the key's share and isn't its only one.
        """
        most, own = self._settings.body_mib * 2**20, self._reading[key]
        if self._reading.total() + size > most or (own and own + size > most * SHARE):
            raise RequestRefused(LATER, "the server is busy")
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
