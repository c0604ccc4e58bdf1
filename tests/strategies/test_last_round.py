"""The last round of a method: devices train B only, and the method gets every update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from models.lora.adapter import Adapter, Factors, rank
from models.lora.directions import divide
from protocol.messages import Train
from server.rounds.loop import run_rounds
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.rolora import RoLoRA
from strategies.last_round import LastRound
from strategies.planning.plan import CosineDecay
from tests.helpers.fleet import PLAN, SITES, FakeDevice, fresh_state, handle, perform, strategy
from training.personalization.population import Population


class Records(Population):
    """Keeps the adapters that it gets."""

    def after_last_round(self, shared: Adapter, trained: Sequence[Adapter]) -> Adapter:
        self.received = shared, list(trained)
        return super().after_last_round(shared, trained)


def random_adapter(size: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(size, site.inputs, generator=generator), torch.randn(site.outputs, size, generator=generator)
        )
        for name, site in SITES.items()
    }


def test_only_the_last_round_is_different() -> None:
    rule, inner = LastRound(RoLoRA(), Population(round_steps=9), rounds=4), RoLoRA()
    assert [rule.trains(number) for number in range(1, 5)] == ["b", "a", "b", "b"]
    assert [rule.steps(number) for number in range(1, 5)] == [None, None, None, 9]
    current = random_adapter(2, 0)
    updates = [(random_adapter(2, 1), 1.0), (random_adapter(2, 2), 3.0)]
    for number in (1, 2):
        one, other = (each.aggregate(current, updates, round=number).adapter for each in (rule, inner))
        assert all(torch.equal(a, b) for name in SITES for a, b in zip(one[name], other[name], strict=True))


def test_untrained_parts_count_with_current_values() -> None:
    """One device trained a lower rank, another one only a site."""
    method, current = Records(number=1), random_adapter(3, 0)
    small, single = random_adapter(2, 1), {"x": random_adapter(3, 2)["x"]}
    result = LastRound(FedIT(), method, rounds=1).aggregate(current, [(small, 1.0), (single, 9.0)], round=1)
    _, (one, other) = method.received
    for name in SITES:
        assert torch.equal(one[name].a, current[name].a)
        assert torch.equal(one[name].b[:, :2], small[name].b)
        assert torch.equal(one[name].b[:, 2:], current[name].b[:, 2:])
    assert torch.equal(other["x"].b, single["x"].b)
    assert torch.equal(other["y"].b, current["y"].b)
    shared, _ = divide(result.adapter, 1)
    for name in SITES:
        assert torch.equal(shared[name].b, current[name].b)


def test_run_ends_with_the_directions_of_its_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of the last round train B for its own steps, at the rate of the plan."""
    plans: list[Any] = []

    def spying(request: Any, device: FakeDevice) -> Any:
        if isinstance(request, Train):
            plans.append(request.plan)
        return (yield from handle(request, device))

    rule = LastRound(Exact(rank=3, max_rank=3, seed=0), Population(number=2, round_steps=9), rounds=3)
    federated = strategy(aggregation=rule, lr_schedule=CosineDecay(rounds=3))
    monkeypatch.setattr("simulations.grid.cohort.handle", spying)
    devices: list[Any] = [FakeDevice(f"d{index}") for index in range(4)]
    state = run_rounds(
        grid=CohortGrid(devices, perform),
        strategy=federated,
        state=fresh_state(private=True),
        rounds=3,
        checkpoints=tmp_path,
        on_round=lambda _: None,
    )
    last = [plan for plan in plans if plan.round == 3]
    assert {(plan.trains, plan.steps, plan.learning_rate) for plan in last} == {("b", 9, PLAN.learning_rate)}
    assert {(plan.trains, plan.steps) for plan in plans if plan.round < 3} == {("both", PLAN.steps)}
    assert rank(state.best_adapter) == 9
    assert state.best_round == 3
    shared, directions = divide(state.adapter, 2)
    assert all(directions[name].any() for name in SITES)
    assert all(not f.a[3:].any() for f in state.adapter.values())
    assert rank(shared) == 3
