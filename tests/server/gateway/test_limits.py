"""Requests a minute and at once, and memory for bodies."""

import contextlib

import pytest

from conf.schemas.server import Limits
from server.gateway.limits import Budget
from server.gateway.refusal import LATER, Refusal


def test_requests_come_back_with_time():
    now = [0.0]
    budget = Budget(Limits(requests_per_minute=60), lambda: now[0])
    for _ in range(60):
        budget.take("key")
    with pytest.raises(Refusal, match="too many requests") as error:
        budget.take("key")
    assert error.value.status == LATER
    now[0] = 1.0
    budget.take("key")
    with pytest.raises(Refusal):
        budget.take("key")


def test_a_punishment_ends():
    now = [0.0]
    budget = Budget(Limits(requests_per_minute=60), lambda: now[0])
    for _ in range(1000):
        budget.punish("key")
    now[0] = 59.0
    with pytest.raises(Refusal):
        budget.take("key")
    now[0] = 62.0
    budget.take("key")


def test_requests_at_once_and_memory_are_given_back():
    budget = Budget(Limits(concurrent=1, body_mib=1))
    for _ in range(3):
        with budget.working("key"), budget.reading("key", 1 << 20):
            with pytest.raises(Refusal), budget.working("key"):
                pass
            with budget.working("other"), pytest.raises(Refusal), budget.reading("other", 1):
                pass


def test_one_key_leaves_memory_to_others():
    """An object of Flower's is up to 20 MiB: eight requests of one device, held for an hour at the slowest rate."""
    budget, held = Budget(Limits(body_mib=256)), 0
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            with contextlib.suppress(Refusal):
                stack.enter_context(budget.reading("one", 20 << 20))
                held += 1
        assert held == 3
        for other in range(9):
            stack.enter_context(budget.reading(f"other {other}", 20 << 20))
    with budget.reading("one", 200 << 20):  # whatever its size, one alone is let in
        pass
    assert not budget._reading


def test_keys_are_forgotten():
    now = [0.0]
    budget = Budget(Limits(), lambda: now[0])
    for number in range(10_000):
        now[0] += 0.1
        budget.take(str(number))
    assert len(budget._buckets) < 5000
