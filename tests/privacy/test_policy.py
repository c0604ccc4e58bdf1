"""The owner's policy: requests that a server may not make."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import AntherError
from privacy.accounting import NonPrivate, PoissonGaussian, epsilon, noise_multiplier_for
from privacy.policy import DEFAULT_MAX_EPSILON, Policy, RequestRefusedError, load
from protocol.messages import EvaluationPrivacy, ExamplePrivacy, TrainingPlan

PRIVACY = ExamplePrivacy(noise_multiplier=1.0, clip=0.01, sampling_rate=0.5, draws=2, delta=1e-3)
PLAN = TrainingPlan(run="r", round=1, base="b", rank=4, steps=4, batch_size=4, learning_rate=1e-3)
MEASURE = EvaluationPrivacy(noise_multiplier=5.0, clip=0.1, pictures=5, delta=1e-3)


def test_ordinary_plan_is_allowed() -> None:
    Policy().check_plan(PLAN)
    Policy(max_epsilon=1.0).check_plan(replace(PLAN, privacy=PRIVACY))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": 1025},
        {"steps": 0},
        {"steps": 10_001},
        {"batch_size": 0},
        {"batch_size": 1025},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
    ],
)
def test_too_much_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RequestRefusedError, match="this device allows"):
        Policy().check_plan(replace(PLAN, **wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": 0.049},
        {"noise_multiplier": 1e300},
        {"clip": 0.0},
        {"clip": math.inf},
        {"clip": math.nan},
        {"clip": 100.1},
        {"delta": math.nan},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.01},
        {"sampling_rate": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"draws": 0},
        {"draws": -5},
        {"draws": 10_000},
    ],
)
def test_meaningless_privacy_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RequestRefusedError):
        Policy().check_plan(replace(PLAN, privacy=replace(PRIVACY, **wrong)))  # type: ignore[arg-type]


def test_cap_forbids_sharing_without_noise() -> None:
    strict = Policy(max_epsilon=1.0)
    with pytest.raises(RequestRefusedError, match="without example privacy"):
        strict.check_plan(PLAN)
    with pytest.raises(RequestRefusedError, match="without example privacy"):
        strict.check_spending([], NonPrivate())
    with pytest.raises(RequestRefusedError, match="without noise"):
        strict.check_evaluation(None)
    strict.check_evaluation(MEASURE)


@pytest.mark.parametrize(
    ("measures", "noised", "raw"),
    [
        ("none", False, False),
        ("noised", True, False),
        ("raw", True, True),
    ],
)
def test_allowed_evaluations(measures: str, noised: bool, raw: bool) -> None:
    policy = Policy(measures=measures)
    for privacy, allowed in ((MEASURE, noised), (None, raw)):
        if allowed:
            policy.check_evaluation(privacy)
        else:
            with pytest.raises(RequestRefusedError, match="losses"):
                policy.check_evaluation(privacy)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.049},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"clip": 0.0},
        {"clip": 101.0},
        {"clip": math.nan},
        {"pictures": 0},
        {"delta": 0.0},
        {"delta": 1.0},
    ],
)
def test_meaningless_evaluation_noise_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RequestRefusedError):
        Policy().check_evaluation(replace(MEASURE, **wrong))  # type: ignore[arg-type]


def test_allowed_bases_and_sites() -> None:
    Policy().check_adaptable("b" * 64, ["down.attn1.to_q", "time_emb"], {})
    policy = Policy(bases=("a" * 64,), sites=r".*attn[12]\..*")
    policy.check_adaptable("a" * 64, ["down.attn1.to_q", "up.attn2.to_out.0"], {})
    with pytest.raises(RequestRefusedError, match="base bbbbbbbbbbbb"):
        policy.check_adaptable("b" * 64, ["down.attn1.to_q"], {})
    with pytest.raises(RequestRefusedError, match=r"site down\.attn3\.to_q"):
        policy.check_adaptable("a" * 64, ["down.attn1.to_q", "down.attn3.to_q"], {})
    with pytest.raises(RequestRefusedError, match="site"):  # the pattern has to match the full name
        Policy(sites="attn1").check_adaptable("b", ["down.attn1.to_q"], {})


def test_allowed_sites_by_name() -> None:
    named = {"attention": {"to_q"}, "linear": {"to_q", "ff"}, "all": {"to_q", "ff", "conv_in"}}
    for name, sites in named.items():
        policy = Policy(sites=name)
        policy.check_adaptable("b", sites, named)
        for forbidden in sorted(named["all"] - sites):
            with pytest.raises(RequestRefusedError, match=f"site {forbidden}: this device allows {name}"):
                policy.check_adaptable("b", ["to_q", forbidden], named)
        with pytest.raises(RequestRefusedError, match="site to_q"):
            policy.check_adaptable("b", ["to_q"], {})  # no layers are known for the name


def test_minimum_of_pictures_reveals_no_number() -> None:
    Policy().check_pictures(1)
    Policy(min_pictures=7).check_pictures(7)
    said = set()
    for count in range(7):
        with pytest.raises(RequestRefusedError) as raised:
            Policy(min_pictures=7).check_pictures(count)
        said.add(str(raised.value))
    (words,) = said
    assert not any(character.isdigit() for character in words)


def test_cap_applies_to_composition_at_own_delta() -> None:
    round_ = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=25)  # ε(1e-3): 1.6 once, 2.36 twice
    Policy(max_epsilon=2.0, delta=1e-3).check_spending([], round_)
    with pytest.raises(RequestRefusedError, match="allows 2"):
        Policy(max_epsilon=2.0, delta=1e-3).check_spending([round_], round_)
    with pytest.raises(RequestRefusedError, match="allows 2"):
        Policy(max_epsilon=2.0, delta=1e-6).check_spending([], round_)


def test_default_cap() -> None:
    round_ = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=25)
    past = [round_] * 20
    assert epsilon(past, 1e-5).value < DEFAULT_MAX_EPSILON < epsilon([round_] * 1000, 1e-5).value
    Policy().check_spending(past, round_)
    with pytest.raises(RequestRefusedError, match="allows 16"):
        Policy().check_spending([round_] * 1000, round_)
    Policy(max_epsilon=2000.0).check_spending([round_] * 1000, round_)


@pytest.mark.integration
def test_default_cap_allows_one_default_run() -> None:
    sigma = noise_multiplier_for(epsilon=8.0, delta=1e-3, sampling_rate=0.8, steps=16)  # `privacy=example`
    run = PoissonGaussian(noise_multiplier=sigma, sampling_rate=0.8, steps=16)
    Policy().check_spending([], run)
    with pytest.raises(RequestRefusedError, match="allows 16"):
        Policy().check_spending([run], run)


def test_no_private_release_after_sharing_without_noise() -> None:
    private = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=25)
    with pytest.raises(RequestRefusedError, match="no ε can be promised"):
        Policy().check_spending([NonPrivate()], private)


def test_no_sharing_without_noise_after_private_release() -> None:
    private = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=25)
    Policy().check_spending([], NonPrivate())
    Policy().check_spending([NonPrivate()], NonPrivate())
    with pytest.raises(RequestRefusedError, match="nothing without it since"):
        Policy().check_spending([private], NonPrivate())


def test_policy_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    assert load(file) == Policy()
    file.write_text("max_epsilon = 4\ndelta = 1e-4\n")
    assert load(file) == Policy(max_epsilon=4, delta=1e-4)
    written = Policy(
        max_epsilon=4.0,
        delta=1e-4,
        min_noise_multiplier=0.5,
        max_clip=0.1,
        min_pictures=10,
        sites=".*attn.*",
        bases=("a" * 64, "b" * 64),
        measures="noised",
        max_rank=16,
        max_steps=50,
        max_batch=64,
    )
    file.write_text("\n".join(f"{name} = {_toml(value)}" for name, value in vars(written).items()))
    assert load(file) == written


def _toml(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    "text",
    [
        "max_epsilon = ",
        "epsilon = 4",
        'max_epsilon = "4"',
        "max_epsilon = 0",
        "max_epsilon = nan",
        "delta = 1",
        "\xff",
        "max_epsilon = inf",
        "min_noise_multiplier = 0",
        "max_clip = 0",
        "min_pictures = -1",
        "min_pictures = 2.5",
        'sites = "("',
        "sites = 3",
        'bases = ["short"]',
        'bases = "all"',
        'measures = "some"',
        "measures = true",
        "max_rank = 0",
        "max_steps = 0",
        "max_batch = 0",
        "max_rank = true",
        "[delta]",
    ],
)
def test_invalid_policy_file_gives_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(AntherError) as raised:
        load(tmp_path / "policy.toml")
    assert "\n" not in str(raised.value)
    assert "policy.toml" in str(raised.value)
