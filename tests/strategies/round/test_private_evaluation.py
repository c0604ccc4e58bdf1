"""Evaluation on devices, and its privacy cost."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import AntherError
from conf.schemas.simulation import SimulationConfig
from privacy.accounting import PoissonGaussian, epsilon
from privacy.noise import SecureNoise, SimulatedNoise
from privacy.noised_gain import STEPS_PER_CLIP
from protocol.messages import Evaluation, EvaluationPrivacy
from server.rounds.state import Round
from strategies.factory.combination import check_configuration
from strategies.factory.full_plan import training_plan
from strategies.round.private_evaluation import (
    CentralDPEvaluation,
    EvaluationPolicy,
    evaluation_mechanisms,
    evaluation_policy,
)
from tests.helpers.configs import compose
from tests.helpers.fleet import fresh_state

PICTURES = EvaluationPrivacy(noise_multiplier=4.0, clip=0.1, pictures=5, delta=1e-3)


def private_config(overrides: str) -> SimulationConfig:
    return compose(f"privacy=example rounds=6 adapter.shared.steps=3 data.train=16 {overrides}")


def raw(device: str, base: float, shared: float) -> Evaluation:
    return Evaluation(device=device, round=2, base=base, shared=shared)


def gain(device: str, value: float, spent: float = 1.0) -> Evaluation:
    return Evaluation(device=device, round=2, base=None, shared=None, gain=value, epsilon=spent)


def central_noise(noise_rounds: list[int] | None = None, **changes: Any) -> EvaluationPolicy:
    def noise(round: int) -> SimulatedNoise:
        if noise_rounds is not None:
            noise_rounds.append(round)
        return SimulatedNoise(seed=3, client="server", round=round, purpose="measure")

    settings: dict[str, Any] = {"noise_multiplier": 2.0, "clip": 0.05, "devices": 4, "noise": noise}
    return EvaluationPolicy(interval=2, central_noise=CentralDPEvaluation(**settings | changes))


@pytest.mark.parametrize(("interval", "due"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (7, [])])
def test_interval_determines_the_rounds(interval: int, due: list[int]) -> None:
    assert [number for number in range(1, 7) if EvaluationPolicy(interval=interval).is_due(number)] == due
    mechanisms = evaluation_mechanisms(private_config(f"private_eval.interval={interval}"))
    assert sum(event.steps for event in mechanisms) == len(due)


@pytest.mark.integration
def test_training_and_evaluation_share_one_epsilon() -> None:
    overrides = "privacy.epsilon=4 private_eval.interval=2 private_eval.noise_multiplier=6"
    config = private_config(overrides)
    plan = training_plan(config, run="r", base="b").privacy
    assert plan is not None
    train = PoissonGaussian(noise_multiplier=plan.noise_multiplier, sampling_rate=plan.sampling_rate, steps=6 * 3)
    evaluations = PoissonGaussian(noise_multiplier=6.0, sampling_rate=1.0, steps=3)
    assert evaluation_mechanisms(config) == (evaluations,)
    assert 0.99 * 4 <= epsilon([train, evaluations], 1e-3).value <= 4
    training_only = training_plan(private_config("privacy.epsilon=4"), run="r", base="b").privacy
    assert training_only is not None
    assert training_only.noise_multiplier < plan.noise_multiplier


def test_evaluation_that_uses_up_epsilon_is_refused() -> None:
    config = private_config("privacy.epsilon=1 private_eval.interval=1 private_eval.noise_multiplier=1")
    with pytest.raises(AntherError, match="measure less often"):
        training_plan(config, run="r", base="b")


@pytest.mark.integration
def test_policy_of_a_configuration() -> None:
    assert evaluation_policy(compose("privacy=none private_eval.interval=3"), simulated=True) == EvaluationPolicy()
    assert evaluation_mechanisms(compose("privacy=none private_eval.interval=3")) == ()
    for level in ("example", "device", "both"):
        assert not evaluation_policy(compose(f"privacy={level}"), simulated=True).is_due(1)
    config = private_config("private_eval.interval=2 data.validation=7 private_eval.clip=0.2")
    assert evaluation_policy(config, simulated=False) == EvaluationPolicy(
        interval=2, local_noise=EvaluationPrivacy(noise_multiplier=10.0, clip=0.2, pictures=7, delta=1e-3)
    )
    with pytest.raises(AntherError, match="privacy=both"):
        check_configuration(compose("aggregation=fedit privacy=both private_eval.interval=2"))


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        ("", 20),
        ("cohort.size=8", 8),
        ("cohort.size=8 cohort.eval_size=5", 5),
    ],
)
def test_server_noise_is_divided_by_the_selected_devices(overrides: str, devices: int) -> None:
    config = compose(f"privacy=device private_eval.interval=2 {overrides}")
    noise = evaluation_policy(config, simulated=False).central_noise
    assert noise is not None
    assert noise.devices == devices
    assert isinstance(noise.noise(1), SecureNoise)
    simulated = evaluation_policy(config, simulated=True).central_noise
    assert simulated is not None
    assert isinstance(simulated.noise(1), SimulatedNoise)


def test_losses_without_noise() -> None:
    result = EvaluationPolicy().summary(2, [raw("a", 1.0, 0.5), raw("b", 0.8, 0.9)], {"refused": 1})
    assert (result.base, result.shared, result.devices) == (0.9, 0.7, {"a": 0.5, "b": 0.9})
    assert (result.gain, result.gain_error, result.epsilon, result.dropped) == (None, None, None, {"refused": 1})
    empty = EvaluationPolicy().summary(2, [], {})
    assert (empty.base, empty.shared) == (None, None)


@pytest.mark.parametrize("lie", [(0.19, 1e11), (0.19, 0.0), (1e-30, 1.0), (1e11, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("others", [2, 19])
def test_one_liar_stays_within_the_honest_range(lie: tuple[float, float], others: int) -> None:
    honest = [raw(f"d{i}", 0.19 + 0.001 * i, 0.16 + 0.0005 * i) for i in range(others)]
    result = EvaluationPolicy().summary(2, [*honest, raw("mallory", *lie)], {})
    for value, values in (
        (result.base, [reply.base for reply in honest]),
        (result.shared, [reply.shared for reply in honest]),
        (result.improved, [1 - reply.shared / reply.base for reply in honest]),
    ):
        assert min(values) - 1e-9 <= value <= max(values) + 1e-9


def test_liar_does_not_choose_the_best_round() -> None:
    """The liar reports a perfect first round and bad others; the last one is the best."""
    state = fresh_state()
    for number, loss in enumerate([None, 0.180, 0.172, 0.165, 0.160]):
        replies = [] if loss is None else [raw(f"d{i}", 0.19, loss) for i in range(19)]
        replies += [] if loss is None else [raw("mallory", 0.19, 0.0 if number == 1 else 1e11)]
        value = EvaluationPolicy().summary(number, replies, {})
        state = state.after(Round(number=number, train=None, validation=value, wall_seconds=1.0), state.adapter)
    assert state.best_round == 4


def test_noised_gain_is_limited() -> None:
    policy = EvaluationPolicy(interval=2, local_noise=PICTURES)
    limit = PICTURES.clip * (1 + 8 * PICTURES.noise_multiplier / PICTURES.pictures)
    assert policy.summary(2, [gain("a", 1e11)], {}).gain == pytest.approx(limit)


def test_gains_with_local_noise() -> None:
    policy = EvaluationPolicy(interval=2, local_noise=PICTURES)
    result = policy.summary(2, [gain("a", 0.3, 1.5), gain("b", -0.1)], {})
    assert (result.base, result.shared) == (None, None)
    assert result.gain == pytest.approx(0.1)
    assert result.gain_error == pytest.approx(4.0 * 0.1 / (5 * 2**0.5))
    assert (result.devices, result.epsilon, result.spent) == ({"a": 0.3, "b": -0.1}, 1.5, {"a": 1.5, "b": 1.0})
    empty = policy.summary(2, [], {})
    assert (empty.gain, empty.gain_error, empty.epsilon) == (None, None, None)


def test_gains_with_central_noise() -> None:
    """No value of a single device is stored, gains are clipped, and noise is added once per round."""
    noise_rounds: list[int] = []
    replies = [raw("a", 1.0, 0.98), raw("b", 1.0, 0.1), raw("c", 0.5, 1e9)]
    result = central_noise(noise_rounds).summary(2, replies, {})
    assert noise_rounds == [2]
    z = SimulatedNoise(seed=3, client="server", round=2, purpose="measure").rounded_gaussian(
        1, 2.0 * STEPS_PER_CLIP
    ).item() / (2.0 * STEPS_PER_CLIP)
    assert result.gain == pytest.approx((0.02 + 0.05 - 0.05 + 2.0 * 0.05 * z) / 4, abs=1e-4)
    assert result.gain_error == pytest.approx(2.0 * 0.05 / 4)
    assert (result.base, result.shared, result.devices, result.spent) == (None, None, {}, {})
    empty = central_noise().summary(2, [], {})
    assert empty.gain == pytest.approx(2.0 * 0.05 * z / 4, abs=1e-4)


def test_one_device_changes_the_sum_by_at_most_the_clip() -> None:
    replies = [raw("a", 1.0, 0.5), raw("b", 1.0, 0.99), raw("c", 0.5, 1e9), raw("d", 1e11, 0.0)]
    full = central_noise().summary(2, replies, {}).gain
    assert full is not None
    for index in range(len(replies)):
        without = central_noise().summary(2, [*replies[:index], *replies[index + 1 :]], {}).gain
        assert without is not None
        assert abs(full - without) * 4 <= 0.05 * (1 + 1e-9)


@pytest.mark.parametrize("reply", [raw("a", 1.0, 0.5), gain("a", 0.1)])
def test_only_requested_values_are_accepted(reply: Evaluation) -> None:
    noised = reply.gain is not None
    assert EvaluationPolicy(local_noise=PICTURES).accepts(reply) == noised
    assert EvaluationPolicy().accepts(reply) == central_noise().accepts(reply) == (not noised)


@pytest.mark.parametrize(
    "reply",
    [
        Evaluation(device="a", round=1, base=1.0, shared=0.5, gain=0.1, epsilon=1.0),
        Evaluation(device="a", round=1, base=1.0, shared=None),
        Evaluation(device="a", round=1, base=None, shared=None),
        Evaluation(device="a", round=1, base=None, shared=None, gain=0.1),
    ],
)
def test_incomplete_replies_are_rejected(reply: Evaluation) -> None:
    assert not EvaluationPolicy().accepts(reply)
    assert not EvaluationPolicy(local_noise=PICTURES).accepts(reply)
