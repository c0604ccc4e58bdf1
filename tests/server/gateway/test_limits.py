"""Requests a minute and at once, and memory for bodies."""

import contextlib

import pytest

from conf.schemas.server import LimitsConfig
from server.gateway.limits import RequestBudget
from server.gateway.refusal import LATER, RequestRefused


def test_requests_come_back_with_time():
    now = [0.0]
    budget = RequestBudget(LimitsConfig(requests_per_minute=60), lambda: now[0])
    for _ in range(60):
        budget.count_request("key")
    with pytest.raises(RequestRefused, match="too many requests") as error:
        budget.count_request("key")
    assert error.value.status == LATER
    now[0] = 1.0
    budget.count_request("key")
    with pytest.raises(RequestRefused):
        budget.count_request("key")


def test_a_punishment_ends():
    now = [0.0]
    budget = RequestBudget(LimitsConfig(requests_per_minute=60), lambda: now[0])
    for _ in range(1000):
        budget.penalize("key")
    now[0] = 59.0
    with pytest.raises(RequestRefused):
        budget.count_request("key")
    now[0] = 62.0
    budget.count_request("key")


def test_requests_at_once_and_memory_are_given_back():
    budget = RequestBudget(LimitsConfig(concurrent_requests=1, request_memory_mib=1))
    for _ in range(3):
        with budget.request_slot("key"), budget.reserve_memory("key", 1 << 20):
            with pytest.raises(RequestRefused), budget.request_slot("key"):
                pass
            with budget.request_slot("other"), pytest.raises(RequestRefused), budget.reserve_memory("other", 1):
                pass


def test_one_key_leaves_memory_to_others():
    """An object of Flower's is up to 20 MiB: eight requests of one device, held for an hour at the slowest rate."""
    budget, held = RequestBudget(LimitsConfig(request_memory_mib=256)), 0
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            with contextlib.suppress(RequestRefused):
                stack.enter_context(budget.reserve_memory("one", 20 << 20))
                held += 1
        assert held == 3
        for other in range(9):
            stack.enter_context(budget.reserve_memory(f"other {other}", 20 << 20))
    with budget.reserve_memory("one", 200 << 20):  # whatever its size, one alone is let in
        pass
    assert not budget._reserved


def test_keys_are_forgotten():
    now = [0.0]
    budget = RequestBudget(LimitsConfig(), lambda: now[0])
    for number in range(10_000):
        now[0] += 0.1
        budget.count_request(str(number))
    assert len(budget._buckets) < 5000
