"""Plans within limits, and selections by name."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Site
from protocol.messages import DeviceReport, ExamplePrivacy, MethodOption, PersonalizationMethod, TrainingPlan
from strategies.planning.plan import CosineDecay, PlanLimits, seconds_per_step, upload_bytes
from strategies.planning.planner import Planner
from strategies.selection.everyone import Everyone
from strategies.selection.fixed_panel import FixedPanel
from strategies.selection.sample import Sample
from training.public_schedule import scheduled_turns
from training.round_work import examples_per_round, steps_per_round

REPORT = DeviceReport(
    device="a",
    base="b",
    profile="p",
    memory_gib=4.0,
    examples_per_second=2.0,
    watts=5.0,
    uplink_mbps=8.0,
    downlink_mbps=80.0,
)
FULL = TrainingPlan(run="r", round=1, base="b", rank=8, steps=10, batch_size=4, learning_rate=1e-3)


SITES = {"x": Site(15_625, 15_625)}  # 1 Mbit per direction


def planned_device(report=REPORT, full=FULL, **limits):
    planner = Planner(sites=SITES, limits=PlanLimits(**limits))
    return planner.plans([report], full, adapter={}, download=10_000_000)[report.device]


def plan(report=REPORT, full=FULL, **limits):
    return planned_device(report, full, **limits).plan


def test_full_plan_without_limits():
    assert plan() == FULL


def test_metered_link_reduces_rank():
    metered = replace(REPORT, metered=True)
    assert plan(metered, metered_rank=4) == replace(FULL, rank=4)
    assert plan(metered, metered_rank=16) == FULL
    assert plan(metered) == FULL
    assert plan(metered_rank=4) == FULL


def test_metered_and_slow_links_reduce_precision():
    metered, slow = replace(REPORT, metered=True), replace(REPORT, uplink_mbps=1.9)
    reduced = replace(FULL, update="int4")
    assert plan(metered, metered_update="int4") == plan(slow, metered_update="int4") == reduced
    assert plan(metered, metered_update="int4", feedback=True) == replace(reduced, feedback=True)
    assert plan(replace(REPORT, uplink_mbps=2.0), metered_update="int4") == plan(metered) == FULL
    limited = replace(FULL, update="int8")
    assert plan(metered, full=limited, metered_update="int4").update == "int4"
    assert plan(metered, full=limited, metered_update="fp16") == limited  # never more bits than the full plan
    assert planned_device(metered, metered_update="int4").seconds < planned_device(metered).seconds
    assert planned_device(metered, replace(FULL, scaffold=True), metered_update="int4").plan.update == "int4"


def test_plan_respects_rank_and_sites_of_the_device():
    limited = replace(REPORT, rank=4)
    assert plan(limited) == replace(FULL, rank=4)
    assert plan(replace(limited, metered=True), metered_rank=2) == replace(FULL, rank=2)
    assert plan(replace(REPORT, rank=16)) == FULL
    assert (
        Planner(sites=SITES, limits=PlanLimits(), mixed_ranks=False).plans([limited], FULL, adapter={}, download=1)
        == {}
    )
    two = {"x": SITES["x"], "y": SITES["x"]}
    for reported, sites in ((("y", "z"), ("y",)), (("y", "x"), None), (("z",), "nothing"), ((), "nothing")):
        plans = Planner(sites=two, limits=PlanLimits()).plans(
            [replace(REPORT, sites=reported)], FULL, adapter={}, download=1
        )
        assert (plans[REPORT.device].plan.sites if plans else "nothing") == sites


def test_steps_meet_the_deadline():
    # 1 s download, 1 s upload, 2 s per step: 3 steps in 9 s
    assert plan(deadline=9.0).steps == 3
    assert plan(deadline=100.0).steps == 10
    assert plan(replace(REPORT, metered=True), metered_rank=4, deadline=9.6).steps == 4  # upload takes 0.5 s


def test_steps_stay_within_the_energy_budget():
    # 10 J per step
    assert plan(joules=35.0).steps == 3
    assert plan(joules=5.0).steps == 1
    battery = replace(REPORT, battery=0.4, battery_wh=0.1)  # 144 J remaining of 360 J
    assert plan(battery, battery_share=0.5).steps == 7
    assert plan(battery, battery_share=0.5, joules=50.0).steps == 5
    for unlimited in (replace(battery, charging=True), replace(battery, battery_wh=None), REPORT):
        assert plan(unlimited, battery_share=0.01).steps == 10


def test_predicted_cost():
    planned = planned_device(deadline=9.0)
    assert (planned.seconds, planned.joules) == (pytest.approx(1 + 1 + 3 * 2), pytest.approx(3 * 2 * 5.0))
    quantized = replace(FULL, update="int8")
    assert planned_device(full=quantized).seconds == pytest.approx(1 + 1 / 4 + 10 * 2, rel=0.01)


def test_upload_covers_trained_tensors_only():
    sites = {"x": Site(3, 4), "y": Site(5, 6)}
    assert upload_bytes(FULL, sites) == 8 * 18 * 4
    assert upload_bytes(replace(FULL, sites=("y",)), sites) == 8 * 11 * 4
    assert upload_bytes(replace(FULL, trains="cores"), sites) == 8 * 16 * 4
    assert upload_bytes(replace(FULL, trains="b"), sites) == 8 * 10 * 4


def test_at_least_one_step():
    assert plan(deadline=0.1).steps == 1


def test_noise_multiplicity_takes_time():
    private = replace(FULL, privacy=ExamplePrivacy(noise_multiplier=1, clip=1, sampling_rate=1, draws=3, delta=0.1))
    assert plan(full=private, deadline=14.5).steps == 2


def test_poisson_batches_take_their_public_duration():
    """Long enough for 10 steps of about 4 of 8 pictures, except with negligible probability."""
    privacy = ExamplePrivacy(noise_multiplier=1, clip=1, sampling_rate=0.5, draws=1, delta=0.1)
    step = seconds_per_step(REPORT, replace(FULL, privacy=privacy)) * REPORT.examples_per_second
    assert step == scheduled_turns(8, 0.5, 10) / 10
    assert 4 < step < 8


def test_everyone_sorts_names():
    assert Everyone().select({"b", "a"}, draw=1) == ["a", "b"]


def test_sample_depends_on_names_draw_and_seed_only():
    names = [f"d{i}" for i in range(20)]
    first = Sample(size=5, seed=1).select(names, draw=3)
    assert first == sorted(set(first))
    assert len(first) == 5
    assert set(first) <= set(names)
    assert Sample(size=5, seed=1).select(names[::-1], draw=3) == first
    others = [Sample(size=5, seed=1).select(names, draw=r) for r in range(20)]
    assert len({tuple(o) for o in others}) > 10
    assert {name for o in others for name in o} == set(names)
    assert Sample(size=5, seed=2).select(names, draw=3) != first


@given(st.sets(st.text(max_size=3), max_size=8), st.integers(1, 6), st.integers(0, 9), st.integers(0, 9))
def test_panel_replaces_absent_devices_only(names: set[str], size: int, seed: int, round: int) -> None:
    panel = FixedPanel(size=size, seed=seed)
    selected = panel.select(names, draw=round)
    assert selected == panel.select(sorted(names), draw=round + 1)
    assert len(selected) == min(size, len(names))
    for absent in names:
        others = panel.select(names - {absent}, draw=round)
        assert set(selected) - {absent} <= set(others)
        assert absent not in others


def test_panel_depends_on_the_seed() -> None:
    names = [f"d{i}" for i in range(20)]
    assert len({tuple(FixedPanel(size=5, seed=seed).select(names, draw=1)) for seed in range(20)}) > 10
    with pytest.raises(ValueError, match="size"):
        FixedPanel(size=0, seed=1)


def test_sample_of_fewer_devices_is_everyone():
    assert Sample(size=5, seed=1).select(["b", "a"], draw=1) == ["a", "b"]
    assert Sample(size=5, seed=1).select([], draw=1) == []
    with pytest.raises(ValueError, match="size"):
        Sample(size=0, seed=1)


def test_cosine_decays_from_full_rate_to_zero():
    rates = [CosineDecay(rounds=8)(0.5, number) for number in range(1, 9)]
    assert rates[0] == 0.5
    assert rates[4] == pytest.approx(0.25)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert 0 < rates[-1] < 0.05 * rates[0]
    assert CosineDecay(rounds=1)(0.5, 1) == 0.5


def test_steps_of_personalization_count():
    method = PersonalizationMethod(name="directions", options=(MethodOption(name="round_steps", value=6.0),))
    with_method = replace(FULL, personalization=method)
    assert steps_per_round(FULL) == FULL.steps
    assert steps_per_round(with_method) == FULL.steps + 6
    assert examples_per_round(with_method) == (FULL.steps + 6) * FULL.batch_size
    plain, more = planned_device(), planned_device(full=with_method)
    assert more.joules == pytest.approx(plain.joules * (FULL.steps + 6) / FULL.steps)


@pytest.mark.parametrize(("round", "added"), [(2, 0), (3, 6)])
def test_limits_hold_with_steps_of_personalization(round: int, added: int) -> None:
    """A step takes 2 s. In a warm-up the method has none."""
    options = tuple(MethodOption(name=name, value=value) for name, value in (("round_steps", 6.0), ("warmup", 2.0)))
    full = replace(FULL, round=round, personalization=PersonalizationMethod(name="directions", options=options))
    transfer = planned_device(full=full).seconds - 2 * (FULL.steps + added)
    limited = planned_device(full=full, deadline=transfer + 2 * 9 + 0.5)
    assert limited.plan.steps + added == 9
    assert limited.seconds == pytest.approx(transfer + 18)
    assert planned_device(full=full, joules=2 * 5.0 * 8).plan.steps + added == 8
