"""The policy: what a server may not ask for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import AntherError
from privacy.accounting import NonPrivate, PoissonGaussian
from privacy.policy import Policy, Refusal, load
from protocol.messages import ExamplePrivacy, TrainingPlan

PRIVACY = ExamplePrivacy(noise_multiplier=1.0, clip=0.01, sampling_rate=0.5, draws=2, delta=1e-3)
PLAN = TrainingPlan(run="r", round=1, base="b", rank=4, steps=4, batch_size=4, learning_rate=1e-3)


def test_an_ordinary_plan_passes() -> None:
    Policy().check_plan(PLAN)
    Policy(max_epsilon=1.0).check_plan(replace(PLAN, privacy=PRIVACY))


@pytest.mark.parametrize("wrong", [
    {"rank": 0}, {"rank": 1025}, {"steps": 0}, {"steps": 10_001}, {"batch_size": 0}, {"batch_size": 1025},
    {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"learning_rate": math.inf},
])  # fmt: skip
def test_too_much_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Refusal, match="asked"):
        Policy().check_plan(replace(PLAN, **wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [
    {"noise_multiplier": 0.0}, {"noise_multiplier": -1.0}, {"noise_multiplier": math.nan},
    {"noise_multiplier": math.inf}, {"noise_multiplier": 0.049}, {"clip": 0.0}, {"clip": math.inf}, {"clip": math.nan},
    {"sampling_rate": 0.0}, {"sampling_rate": 1.01}, {"sampling_rate": math.nan}, {"delta": 0.0}, {"delta": 1.0},
    {"draws": 0}, {"draws": -5}, {"draws": 10_000},
])  # fmt: skip
def test_privacy_that_promises_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Refusal):
        Policy().check_plan(replace(PLAN, privacy=replace(PRIVACY, **wrong)))  # type: ignore[arg-type]


def test_a_cap_forbids_everything_without_noise() -> None:
    strict = Policy(max_epsilon=1.0)
    with pytest.raises(Refusal, match="without example privacy"):
        strict.check_plan(PLAN)
    with pytest.raises(Refusal, match="measure"):
        strict.check_measure()
    Policy().check_measure()


def test_the_cap_is_on_the_whole_and_at_the_policys_own_delta() -> None:
    round_ = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=25)  # ε(1e-3): 1.6 once, 2.36 twice
    Policy(max_epsilon=2.0, delta=1e-3).check_spending([], round_)
    with pytest.raises(Refusal, match="allows 2"):
        Policy(max_epsilon=2.0, delta=1e-3).check_spending([round_], round_)
    with pytest.raises(Refusal, match="allows 2"):
        Policy(max_epsilon=2.0, delta=1e-6).check_spending([], round_)
    Policy().check_spending([round_] * 1000, round_)


def test_no_epsilon_is_promised_after_sharing_without_noise() -> None:
    private = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=25)
    with pytest.raises(Refusal, match="no ε can be promised"):
        Policy().check_spending([NonPrivate()], private)
    Policy().check_spending([NonPrivate(), private], NonPrivate())


def test_a_policy_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    assert load(file) == Policy()
    file.write_text("max_epsilon = 4\ndelta = 1e-4\n")
    assert load(file) == Policy(max_epsilon=4, delta=1e-4)


@pytest.mark.parametrize("text", [
    "max_epsilon = ", "epsilon = 4", 'max_epsilon = "4"', "max_epsilon = 0", "max_epsilon = nan", "delta = 1", "\xff",
])  # fmt: skip
def test_a_policy_file_with_a_mistake_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(AntherError) as raised:
        load(tmp_path / "policy.toml")
    assert "\n" not in str(raised.value)
