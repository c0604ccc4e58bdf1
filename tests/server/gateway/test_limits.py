"""Limits on request rate, concurrent requests, and memory for bodies."""

import contextlib

import pytest

from conf.schemas.server import LimitsConfig
from server.gateway.limits import RequestBudget
from server.gateway.refusal import LATER, RequestRefused


def test_rate_budget_refills():
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


def test_penalty_expires():
    now = [0.0]
    budget = RequestBudget(LimitsConfig(requests_per_minute=60), lambda: now[0])
    for _ in range(1000):
        budget.penalize("key")
    now[0] = 59.0
    with pytest.raises(RequestRefused):
        budget.count_request("key")
    now[0] = 62.0
    budget.count_request("key")


def test_slots_and_memory_are_released():
    budget = RequestBudget(LimitsConfig(concurrent_requests=1, request_memory_mib=1))
    for _ in range(3):
        with budget.request_slot("key"), budget.reserve_memory("key", 1 << 20):
            with pytest.raises(RequestRefused), budget.request_slot("key"):
                pass
            with budget.request_slot("other"), pytest.raises(RequestRefused), budget.reserve_memory("other", 1):
                pass


def test_memory_share_per_key():
    """Flower's objects have up to 20 MiB: one device could hold eight requests for an hour at the slowest rate."""
    budget, reserved = RequestBudget(LimitsConfig(request_memory_mib=256)), 0
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            with contextlib.suppress(RequestRefused):
                stack.enter_context(budget.reserve_memory("one", 20 << 20))
                reserved += 1
        assert reserved == 3
        for other in range(9):
            stack.enter_context(budget.reserve_memory(f"other {other}", 20 << 20))
    with budget.reserve_memory("one", 200 << 20):  # a key's only body may have any size
        pass
    assert not budget._reserved


def test_idle_keys_are_forgotten():
    now = [0.0]
    budget = RequestBudget(LimitsConfig(), lambda: now[0])
    for number in range(10_000):
        now[0] += 0.1
        budget.count_request(str(number))
    assert len(budget._buckets) < 5000
