"""Plans by sites against every set of sites there is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.units import GIB, MIB
from models.footprint.footprint import MARGIN
from models.footprint.site_costs import PassCosts, SiteCost
from models.lora.adapter import Factors, Site
from protocol.messages import TrainingPlan
from strategies.planning.knapsack import choices
from strategies.planning.plan import PlanLimits
from strategies.planning.planner import Planner
from strategies.planning.site_selection import SiteSelector, fitted, gains, product_norm
from tests.helpers.fleet import PLAN, REPORT


def table(found: Mapping[str, tuple[int, int]], works: Mapping[str, tuple[float, float]] | None = None) -> PassCosts:
    """Of sites in the order of a pass: what is held from each on, and what it takes itself."""
    works = works or {}
    return PassCosts(
        sites=tuple(
            SiteCost(
                name=name,
                peak_bytes=held,
                site_bytes=own,
                work=works.get(name, (0.9, 0.0))[0],
                site_work=works.get(name, (0.9, 0.0))[1],
            )
            for name, (held, own) in found.items()
        )
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[PassCosts, dict[str, float]]:
    """Up to seven sites: what is held falls, and so does the time, the later a pass comes to the first of them."""
    count = draw(st.integers(1, 7))
    names = [f"s{i}" for i in range(count)]
    held = sorted(draw(st.lists(st.integers(1, 60), min_size=count, max_size=count)), reverse=True)
    work = sorted(draw(st.lists(st.floats(0.2, 0.7), min_size=count, max_size=count)), reverse=True)
    own = draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    extra = draw(st.lists(st.floats(0.0, 0.04), min_size=count, max_size=count))
    worth = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count).filter(any))
    costs = table(
        {n: (h * MIB, o * MIB) for n, h, o in zip(names, held, own, strict=True)},
        dict(zip(names, zip(work, extra, strict=True), strict=True)),
    )
    return costs, {name: value / sum(worth) for name, value in zip(names, worth, strict=True)}


def sets(costs: PassCosts) -> Iterator[tuple[str, ...]]:
    names = [site.name for site in costs.sites]
    return itertools.chain.from_iterable(itertools.combinations(names, size) for size in range(1, len(names) + 1))


SITES = {f"s{i}": Site(64, 64) for i in range(7)}
FULL = replace(PLAN, rank=4, steps=10)
MEMORY = st.floats(0.001, 0.3)
LIMITS = st.builds(PlanLimits, deadline=st.none() | st.floats(0.1, 30), joules=st.none() | st.floats(0.1, 200))


def steps(costs: PassCosts, chosen: tuple[str, ...], limits: PlanLimits) -> int:
    """By hand: 2 seconds and 10 joules a step at every site, and what goes up and down at 8 megabits a second."""
    seconds, sent = 2.0 * costs.work(chosen), 1000 / 1e6 + 4 * len(chosen) * 128 * 4 / 1e6
    most = float(FULL.steps)
    if limits.deadline is not None:
        most = min(most, (limits.deadline - sent) / seconds)
    if limits.joules is not None:
        most = min(most, limits.joules / (seconds * 5.0))
    return max(0, int(most))


def plan(costs: PassCosts, worth: dict[str, float], limits: PlanLimits, memory: float) -> TrainingPlan | None:
    names = {site.name for site in costs.sites}
    found = fitted(
        replace(REPORT, memory_gib=memory),
        FULL,
        limits,
        SiteSelector(costs=costs, runtime_bytes=0),
        choices(costs, worth),
        sites={name: site for name, site in SITES.items() if name in names},
        download=1000,
    )
    return found and found[0]


def value(costs: PassCosts, worth: dict[str, float], found: TrainingPlan | None) -> float:
    names = [site.name for site in costs.sites]
    return 0.0 if found is None else found.steps * sum(worth[name] for name in found.sites or names)


@given(problems(), LIMITS, MEMORY)
def test_the_best_of_all_sets_and_never_over_a_limit(
    problem: tuple[PassCosts, dict[str, float]], limits: PlanLimits, memory: float
) -> None:
    costs, worth = problem
    able = [chosen for chosen in sets(costs) if MARGIN * costs.bytes(chosen) <= memory * GIB]
    best = max((steps(costs, chosen, limits) * sum(map(worth.__getitem__, chosen)) for chosen in able), default=0.0)
    found = plan(costs, worth, limits, memory)
    assert value(costs, worth, found) == pytest.approx(best)
    if found is None:
        assert all(steps(costs, chosen, limits) == 0 for chosen in able)
        return
    chosen = found.sites or tuple(site.name for site in costs.sites)
    assert chosen in able
    assert 1 <= found.steps <= steps(costs, chosen, limits)


@given(problems(), LIMITS, MEMORY, MEMORY)
def test_more_memory_is_never_worse(
    problem: tuple[PassCosts, dict[str, float]], limits: PlanLimits, one: float, other: float
) -> None:
    few, many = (value(*problem, plan(*problem, limits, memory)) for memory in sorted((one, other)))
    assert few <= many + 1e-9


@given(problems(), st.integers(2, 6))
def test_of_fewer_partial_sets_the_best_single_one_and_all_of_them_stay(
    problem: tuple[PassCosts, dict[str, float]], most: int
) -> None:
    costs, worth = problem
    found = {choice.sites for choice in choices(costs, worth, most=most)}
    assert {(site.name,) for site in costs.sites} <= found
    assert max(sum(worth[name] for name in chosen) for chosen in found) == pytest.approx(1.0)
    assert len(found) <= 2 * most * len(costs.sites)


@given(problems())
def test_choices_cost_what_their_sites_do(problem: tuple[PassCosts, dict[str, float]]) -> None:
    costs, worth = problem
    for choice in choices(costs, worth):
        assert choice.bytes == costs.bytes(choice.sites)
        assert choice.work == pytest.approx(costs.work(choice.sites))
        assert choice.gain == pytest.approx(sum(worth[name] for name in choice.sites))


def test_of_many_sites_little_is_lost() -> None:
    """Forty alike: as many as fit, which is the best there is."""
    names = [f"s{i:02d}" for i in range(40)]
    costs = table(dict.fromkeys(names, (100 * MIB, 2 * MIB)))
    found = choices(costs, dict.fromkeys(names, 1 / 40))
    for room in range(40):
        able = [choice for choice in found if choice.bytes <= (100 + 2 * room) * MIB]
        assert max((len(choice.sites) for choice in able), default=0) == room


def test_a_base_that_stands_for_a_larger_one_takes_its_memory() -> None:
    costs = table({"s0": (64 * MIB, MIB)})
    fits = SiteSelector(costs=costs, memory=4.0, runtime_bytes=128 * MIB)
    (choice,) = choices(costs, {"s0": 1.0})
    needed = MARGIN * (128 + 4 * 65) / 1024
    assert fits.fits(choice, replace(REPORT, memory_gib=needed + 1e-6))
    assert not fits.fits(choice, replace(REPORT, memory_gib=needed - 1e-6))


def test_gains_are_half_even_and_half_by_the_product() -> None:
    torch.manual_seed(0)
    adapter = {"x": Factors(torch.randn(3, 6), torch.randn(5, 3)), "y": Factors(torch.randn(3, 4), torch.zeros(7, 3))}
    norm = torch.linalg.matrix_norm(adapter["x"].b @ adapter["x"].a).item()
    assert product_norm(adapter["x"]) == pytest.approx(norm, rel=1e-5)
    assert gains(adapter) == pytest.approx({"x": 0.75, "y": 0.25})
    assert gains({name: factors._replace(b=0 * factors.b) for name, factors in adapter.items()}) == {"x": 0.5, "y": 0.5}


def test_a_plan_is_made_once_for_devices_that_tell_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("strategies.planning.planner.fitted", lambda report, *_, **__: made.append(report))
    costs = table({"s0": (MIB, MIB), "s1": (MIB, MIB)})
    planner = Planner(sites=SITES, limits=PlanLimits(), fitting=SiteSelector(costs=costs))
    adapter = {name: Factors(torch.zeros(4, 64), torch.zeros(64, 4)) for name in ("s0", "s1")}
    reports = [replace(REPORT, device=f"d{i}", memory_gib=1.0 + i % 3) for i in range(300)]
    assert planner.plans(reports, FULL, adapter=adapter, download=1000) == {}
    assert len(made) == 3
