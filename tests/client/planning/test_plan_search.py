"""Plan search: no accepted option may exceed memory, and no better feasible option is skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.planning import plan_search as plan_search
from client.planning.plan_search import (
    TrainingOption,
    TrainingSetting,
    evaluate_option,
    fastest_option,
    pass_seconds,
    search_plans,
)
from common.units import GIB, HOUR
from conf.schemas.planning import DeviceProfileConfig, PlanConfig
from models.footprint.footprint import MARGIN, Footprint

RESOLUTIONS, SITES, WEIGHTS = (512, 256), ("attention", "cross"), ("fp32", "int8", "nf4")
ALL = plan_search.settings(RESOLUTIONS, SITES, WEIGHTS)
BASE = {"fp32": 3.2, "int8": 0.8, "nf4": 0.45}


def device(**changes: float | None) -> DeviceProfileConfig:
    plain = {
        "memory_gib": 2.0,
        "runtime_mib": 450.0,
        "matrix_gflops": 20.0,
        "convolution_gflops": 10.0,
        "bandwidth_gbs": 4.0,
        "watts_idle": 2.0,
        "watts_busy": 6.0,
    }
    return DeviceProfileConfig(name="toaster", **{**plain, **changes})  # type: ignore[arg-type]


def footprint(gib: float, work: float = 1.0) -> Footprint:
    return Footprint(
        base_bytes=int(gib * GIB),
        matrix_operations=int(work * 20e9),
        convolution_operations=int(work * 10e9),
        moved_bytes=int(work * 4e9),
    )


def predict(setting: TrainingSetting) -> Footprint:
    """Checkpointing saves half of the activations and costs a third more work."""
    area, plain = (setting.resolution / 512) ** 2 * setting.batch, setting.checkpointing == "none"
    trained = 1.0 if setting.sites == "attention" else 0.9
    gib = BASE[setting.weights] + area * trained * (1.6 if plain else 0.4)
    return footprint(gib, area * (1 if plain else 4 / 3) + 0.1)


def best_of(memory: float, **changes: int | float) -> tuple[list[TrainingOption], int | None]:
    return search_plans(ALL, PlanConfig(device=device(memory_gib=memory), **changes), predict)  # type: ignore[arg-type]


def fits(setting: TrainingSetting, memory: float) -> bool:
    return MARGIN * predict(setting).peak_bytes <= memory * GIB


def test_settings_are_sorted_best_first() -> None:
    assert len(ALL) == 24
    assert ALL[:2] == [
        TrainingSetting(512, "attention", "fp32", "none"),
        TrainingSetting(512, "attention", "fp32", "block"),
    ]
    assert [setting.weights for setting in ALL[:8:2]] == ["fp32", "int8", "nf4", "fp32"]
    assert [setting.resolution for setting in ALL] == [512] * 12 + [256] * 12


@given(memory=st.floats(0.3, 10), pictures=st.integers(1, 9), rungs=st.integers(0, 4))
def test_best_option_uses_fastest_microbatch(memory: float, pictures: int, rungs: int) -> None:
    options, best = best_of(memory, batch_size=pictures, alternatives=rungs, steps=1, min_steps=1, max_hours=1e9)
    able = [setting for setting in ALL if fits(setting, memory)]
    if not able:
        assert best is None
        assert all(rung.blocked for rung in options)
        assert len(options) == len(ALL)
        return
    assert best == ALL.index(able[0])
    assert len(options) == min(len(ALL), best + rungs + 1)
    selected = options[best]
    assert selected.blocked is None
    forms = [replace(able[0], batch=batch) for batch in (1, 2, 4, 8) if batch <= pictures]
    seconds = {form: -(-pictures // form.batch) * pass_seconds(predict(form), device()) for form in forms}
    assert selected.setting in forms
    assert selected.seconds == min(seconds[form] for form in forms if fits(form, memory))
    for above in options[:best]:
        assert above.blocked is not None
        assert above.blocked.startswith("memory: ")
        assert (above.steps, above.seconds, above.joules) == (0, 0.0, 0.0)


def test_memory_margin_is_applied() -> None:
    plan = PlanConfig(device=device(memory_gib=2.0))
    for gib, blocked in ((2.0 / MARGIN - 0.001, False), (2.0 / MARGIN + 0.001, True)):
        options = evaluate_option(ALL[0], plan, lambda _, gib=gib: footprint(gib))
        assert bool(options.blocked) is blocked


def test_seconds_are_work_over_rates() -> None:
    one = footprint(1)
    assert pass_seconds(one, device()) == pytest.approx(1 + 1 + 1)
    assert pass_seconds(one, device(slowdown=2.0)) == pytest.approx(6)
    assert pass_seconds(one, device(convolution_gflops=5.0)) == pytest.approx(1 + 2 + 1)


@pytest.mark.parametrize(
    ("hours", "battery", "steps", "blocked"),
    [
        (1.0, None, 100, None),
        (150 / HOUR, None, 50, None),
        (30 / HOUR, None, 10, "time: 10 steps, of at least 20"),
        (1.0, 1.0, 100, None),  # half of 3600 J, at 18 J per step
        (1.0, 0.5, 50, None),
        (1.0, 0.1, 10, "battery: 10 steps, of at least 20"),
        (60 / HOUR, 0.1, 10, "battery: 10 steps, of at least 20"),
        (30 / HOUR, 0.5, 10, "time: 10 steps, of at least 20"),
    ],
)
def test_time_and_battery_limit_steps(hours: float, battery: float | None, steps: int, blocked: str | None) -> None:
    plan = PlanConfig(device=device(battery_wh=battery), max_hours=hours)
    option = evaluate_option(ALL[0], plan, lambda _: footprint(1))
    assert (option.steps, option.blocked) == (steps, blocked)
    assert option.seconds == pytest.approx(3)
    assert option.joules == pytest.approx(18)
    share = option.battery_share(plan.device)
    assert share == (None if battery is None else pytest.approx(steps * 18 / HOUR / battery))


def test_too_slow_option_gives_smaller_resolution() -> None:
    options, best = best_of(8.0, max_hours=30 / HOUR, min_steps=20)
    assert best is not None
    assert options[best].setting.resolution == 256
    assert {(above.blocked or "").split(":")[0] for above in options[:best]} == {"time"}


def test_larger_microbatches_are_not_predicted() -> None:
    """If a microbatch doesn't fit, larger ones aren't predicted."""
    requested: list[TrainingSetting] = []

    def counting(setting: TrainingSetting) -> Footprint:
        requested.append(setting)
        return predict(setting)

    fastest_option(ALL[0], PlanConfig(device=device(memory_gib=1.0), batch_size=8), counting)
    assert requested == [ALL[0]]
    fastest_option(ALL[2], PlanConfig(device=device(memory_gib=3.0), batch_size=16), counting)
    assert [setting.batch for setting in requested[1:]] == [1, 2]


def test_search_is_deterministic() -> None:
    assert best_of(1.7) == best_of(1.7)
