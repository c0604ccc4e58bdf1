"""Limits on requests: rate and number by device, memory in total."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from conf.schemas.server import LimitsConfig
from server.gateway.refusal import LATER, RequestRefused

HOSTILE_COST = 30.0  # cost of a hostile request, which our SuperNodes never send, in requests
PIECE_COST = 0.1  # cost of a request for a piece of the base, in requests: a large base has thousands of pieces
ACTIVATION_COST = (
    30.0  # cost of activating or deactivating a node, in requests: the server must query the node each time
)

SHARE = 0.25  # maximum fraction of the memory for bodies that one key may use

_MAX_KEYS = 4096  # keys


@dataclass
class _TokenBucket:
    tokens: float
    updated: float


class RequestBudget:
    """Limits on requests per minute and concurrent requests by key, and on bytes of bodies by key and in total.

    Args:
        settings: the limits.
        clock: returns monotonic seconds.
    """

    def __init__(self, settings: LimitsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._buckets: dict[str, _TokenBucket] = {}
        self._concurrent: Counter[str] = Counter()
        self._reserved: Counter[str] = Counter()

    def count_request(self, key: str, amount: float = 1.0) -> None:
        """Count a request of a key.

        Raises:
            RequestRefused: the key's rate limit is exhausted for now.
        """
        bucket = self._refilled(key)
        if bucket.tokens <= 0:
            raise RequestRefused(LATER, "too many requests; try again in a minute")
        bucket.tokens -= amount

    def penalize(self, key: str) -> None:
        """Count a hostile request as `HOSTILE_COST` requests."""
        bucket = self._refilled(key)
        bucket.tokens = max(bucket.tokens - HOSTILE_COST, -float(self._settings.requests_per_minute))

    @contextmanager
    def request_slot(self, key: str) -> Iterator[None]:
        """Take one of the key's slots for concurrent requests.

        Raises:
            RequestRefused: the key already has the maximum number of them.
        """
        if self._concurrent[key] >= self._settings.concurrent_requests:
            raise RequestRefused(LATER, "too many requests at once")
        self._concurrent[key] += 1
        try:
            yield
        finally:
            self._concurrent[key] -= 1
            if not self._concurrent[key]:
                del self._concurrent[key]

    @contextmanager
    def reserve_memory(self, key: str, size: int) -> Iterator[None]:
        """Reserve memory for a body of this many bytes.

        Raises:
            RequestRefused: other bodies use all memory, or the body exceeds the key's share and isn't its only one.
        """
        limit, reserved = self._settings.request_memory_mib * 2**20, self._reserved[key]
        if self._reserved.total() + size > limit or (reserved and reserved + size > limit * SHARE):
            raise RequestRefused(LATER, "the server is busy")
        self._reserved[key] += size
        try:
            yield
        finally:
            self._reserved[key] -= size
            if not self._reserved[key]:
                del self._reserved[key]

    def _refilled(self, key: str) -> _TokenBucket:
        limit, now = float(self._settings.requests_per_minute), self._clock()
        if len(self._buckets) > _MAX_KEYS:
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if now - bucket.updated < 60.0}
        bucket = self._buckets.setdefault(key, _TokenBucket(limit, now))
        bucket.tokens = min(limit, bucket.tokens + (now - bucket.updated) * limit / 60.0)
        bucket.updated = now
        return bucket
