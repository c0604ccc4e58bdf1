"""Site selection against an exhaustive search over all sets of sites."""

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
from strategies.planning.knapsack import site_sets
from strategies.planning.plan import PlanLimits
from strategies.planning.planner import Planner
from strategies.planning.site_selection import SiteSelector, best_plan, product_norm, site_gains
from tests.helpers.fleet import PLAN, REPORT


def table(result: Mapping[str, tuple[int, int]], works: Mapping[str, tuple[float, float]] | None = None) -> PassCosts:
    """Create costs of sites in the order of a pass: (peak bytes from the site on, its own bytes)."""
    works = works or {}
    return PassCosts(
        sites=tuple(
            SiteCost(
                name=name,
                peak_bytes=peak,
                site_bytes=own,
                work=works.get(name, (0.9, 0.0))[0],
                site_work=works.get(name, (0.9, 0.0))[1],
            )
            for name, (peak, own) in result.items()
        )
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[PassCosts, dict[str, float]]:
    """Draw costs and gains of up to seven sites; peak bytes and time decrease in the order of a pass."""
    count = draw(st.integers(1, 7))
    names = [f"s{i}" for i in range(count)]
    peak = sorted(draw(st.lists(st.integers(1, 60), min_size=count, max_size=count)), reverse=True)
    work = sorted(draw(st.lists(st.floats(0.2, 0.7), min_size=count, max_size=count)), reverse=True)
    own = draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    extra = draw(st.lists(st.floats(0.0, 0.04), min_size=count, max_size=count))
    gains = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count).filter(any))
    costs = table(
        {n: (h * MIB, o * MIB) for n, h, o in zip(names, peak, own, strict=True)},
        dict(zip(names, zip(work, extra, strict=True), strict=True)),
    )
    return costs, {name: value / sum(gains) for name, value in zip(names, gains, strict=True)}


def sets(costs: PassCosts) -> Iterator[tuple[str, ...]]:
    names = [site.name for site in costs.sites]
    return itertools.chain.from_iterable(itertools.combinations(names, size) for size in range(1, len(names) + 1))


SITES = {f"s{i}": Site(64, 64) for i in range(7)}
FULL = replace(PLAN, rank=4, steps=10)
MEMORY = st.floats(0.001, 0.3)
LIMITS = st.builds(PlanLimits, deadline=st.none() | st.floats(0.1, 30), joules=st.none() | st.floats(0.1, 200))


def steps(costs: PassCosts, selected: tuple[str, ...], limits: PlanLimits) -> int:
    """Compute the reference number of steps: 2 s and 10 J per step at every site, and transfers at 8 Mbit/s."""
    seconds, transfers = 2.0 * costs.work(selected), 1000 / 1e6 + 4 * len(selected) * 128 * 4 / 1e6
    bound = float(FULL.steps)
    if limits.deadline is not None:
        bound = min(bound, (limits.deadline - transfers) / seconds)
    if limits.joules is not None:
        bound = min(bound, limits.joules / (seconds * 5.0))
    return max(0, int(bound))


def plan(costs: PassCosts, gains: dict[str, float], limits: PlanLimits, memory: float) -> TrainingPlan | None:
    names = {site.name for site in costs.sites}
    result = best_plan(
        replace(REPORT, memory_gib=memory),
        FULL,
        limits,
        SiteSelector(costs=costs, runtime_bytes=0),
        site_sets(costs, gains),
        sites={name: site for name, site in SITES.items() if name in names},
        download=1000,
    )
    return result and result[0]


def value(costs: PassCosts, gains: dict[str, float], result: TrainingPlan | None) -> float:
    names = [site.name for site in costs.sites]
    return 0.0 if result is None else result.steps * sum(gains[name] for name in result.sites or names)


@given(problems(), LIMITS, MEMORY)
def test_best_feasible_set_is_selected(
    problem: tuple[PassCosts, dict[str, float]], limits: PlanLimits, memory: float
) -> None:
    costs, gains = problem
    feasible = [selected for selected in sets(costs) if MARGIN * costs.bytes(selected) <= memory * GIB]
    best = max(
        (steps(costs, selected, limits) * sum(map(gains.__getitem__, selected)) for selected in feasible), default=0.0
    )
    result = plan(costs, gains, limits, memory)
    assert value(costs, gains, result) == pytest.approx(best)
    if result is None:
        assert all(steps(costs, selected, limits) == 0 for selected in feasible)
        return
    selected = result.sites or tuple(site.name for site in costs.sites)
    assert selected in feasible
    assert 1 <= result.steps <= steps(costs, selected, limits)


@given(problems(), LIMITS, MEMORY, MEMORY)
def test_more_memory_is_never_worse(
    problem: tuple[PassCosts, dict[str, float]], limits: PlanLimits, one: float, other: float
) -> None:
    few, many = (value(*problem, plan(*problem, limits, memory)) for memory in sorted((one, other)))
    assert few <= many + 1e-9


@given(problems(), st.integers(2, 6))
def test_thinned_list_keeps_single_sites_and_the_full_set(
    problem: tuple[PassCosts, dict[str, float]], limit: int
) -> None:
    costs, gains = problem
    result = {candidate.sites for candidate in site_sets(costs, gains, max_partial=limit)}
    assert {(site.name,) for site in costs.sites} <= result
    assert max(sum(gains[name] for name in selected) for selected in result) == pytest.approx(1.0)
    assert len(result) <= 2 * limit * len(costs.sites)


@given(problems())
def test_costs_of_a_set_follow_from_its_sites(problem: tuple[PassCosts, dict[str, float]]) -> None:
    costs, gains = problem
    for candidate in site_sets(costs, gains):
        assert candidate.bytes == costs.bytes(candidate.sites)
        assert candidate.work == pytest.approx(costs.work(candidate.sites))
        assert candidate.gain == pytest.approx(sum(gains[name] for name in candidate.sites))


def test_thinning_loses_little_with_many_sites() -> None:
    """With forty equal sites, the best set has as many as fit."""
    names = [f"s{i:02d}" for i in range(40)]
    costs = table(dict.fromkeys(names, (100 * MIB, 2 * MIB)))
    result = site_sets(costs, dict.fromkeys(names, 1 / 40))
    for count in range(40):
        feasible = [candidate for candidate in result if candidate.bytes <= (100 + 2 * count) * MIB]
        assert max((len(candidate.sites) for candidate in feasible), default=0) == count


def test_memory_factor_scales_the_pass() -> None:
    costs = table({"s0": (64 * MIB, MIB)})
    selector = SiteSelector(costs=costs, memory_factor=4.0, runtime_bytes=128 * MIB)
    (candidate,) = site_sets(costs, {"s0": 1.0})
    needed = MARGIN * (128 + 4 * 65) / 1024
    assert selector.fits(candidate, replace(REPORT, memory_gib=needed + 1e-6))
    assert not selector.fits(candidate, replace(REPORT, memory_gib=needed - 1e-6))


def test_held_bytes_count_for_every_set() -> None:
    costs = table({"s0": (64 * MIB, MIB)})
    selector = SiteSelector(costs=costs, memory_factor=2.0, runtime_bytes=0, held_bytes=35 * MIB)
    (candidate,) = site_sets(costs, {"s0": 1.0})
    needed = MARGIN * 2 * (65 + 35) / 1024
    assert selector.fits(candidate, replace(REPORT, memory_gib=needed + 1e-6))
    assert not selector.fits(candidate, replace(REPORT, memory_gib=needed - 1e-6))


def test_gains_are_half_uniform_and_half_product_norm() -> None:
    torch.manual_seed(0)
    adapter = {"x": Factors(torch.randn(3, 6), torch.randn(5, 3)), "y": Factors(torch.randn(3, 4), torch.zeros(7, 3))}
    norm = torch.linalg.matrix_norm(adapter["x"].b @ adapter["x"].a).item()
    assert product_norm(adapter["x"]) == pytest.approx(norm, rel=1e-5)
    assert site_gains(adapter) == pytest.approx({"x": 0.75, "y": 0.25})
    assert site_gains({name: factors._replace(b=0 * factors.b) for name, factors in adapter.items()}) == {
        "x": 0.5,
        "y": 0.5,
    }


def test_equal_reports_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr("strategies.planning.site_selection.best_plan", lambda report, *_, **__: planned.append(report))
    costs = table({"s0": (MIB, MIB), "s1": (MIB, MIB)})
    planner = Planner(sites=SITES, limits=PlanLimits(), method=SiteSelector(costs=costs))
    adapter = {name: Factors(torch.zeros(4, 64), torch.zeros(64, 4)) for name in ("s0", "s1")}
    reports = [replace(REPORT, device=f"d{i}", memory_gib=1.0 + i % 3) for i in range(300)]
    assert planner.plans(reports, FULL, adapter=adapter, download=1000) == {}
    assert len(planned) == 3
