"""What an operator sees of a run's progress, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import AntherError
from conf.compose import compose
from conf.schemas.simulation import SimulationConfig
from privacy.accounting import PoissonGaussian, epsilon
from privacy.bounded_sum import STEPS_PER_CLIP
from privacy.noise import SecureNoise, SimulatedNoise
from protocol.messages import Evaluation, EvaluationPrivacy
from server.rounds.state import Round
from strategies.planning.full_plan import training_plan
from strategies.private_evaluation import CentralDPEvaluation, EvaluationPolicy, evaluation_mechanisms, measuring
from tests.helpers.fleet import fresh_state

PICTURES = EvaluationPrivacy(noise_multiplier=4.0, clip=0.1, pictures=5, delta=1e-3)


def private(overrides: str) -> SimulationConfig:
    return compose(f"privacy=example rounds=6 adapter.shared.steps=3 data.train=16 {overrides}")


def raw(device: str, base: float, shared: float) -> Evaluation:
    return Evaluation(device=device, round=2, base=base, shared=shared)


def gain(device: str, value: float, spent: float = 1.0) -> Evaluation:
    return Evaluation(device=device, round=2, base=None, shared=None, gain=value, epsilon=spent)


def central_noise(drawn: list[int] | None = None, **changes: Any) -> EvaluationPolicy:
    def noise(round: int) -> SimulatedNoise:
        if drawn is not None:
            drawn.append(round)
        return SimulatedNoise(seed=3, client="server", round=round, purpose="measure")

    settings: dict[str, Any] = {"noise_multiplier": 2.0, "clip": 0.05, "devices": 4, "noise": noise}
    return EvaluationPolicy(every=2, central_noise=CentralDPEvaluation(**settings | changes))


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (7, [])])
def test_rounds_that_are_due(every: int, due: list[int]) -> None:
    assert [number for number in range(1, 7) if EvaluationPolicy(every=every).due(number)] == due
    paid = evaluation_mechanisms(private(f"private_eval.interval={every}"))
    assert sum(event.steps for event in paid) == len(due)


def test_training_and_measuring_are_paid_from_one_epsilon() -> None:
    overrides = "privacy.epsilon=4 private_eval.interval=2 private_eval.noise_multiplier=6"
    config = private(overrides)
    plan = training_plan(config, run="r", base="b").privacy
    assert plan is not None
    train = PoissonGaussian(noise_multiplier=plan.noise_multiplier, sampling_rate=plan.sampling_rate, steps=6 * 3)
    measured = PoissonGaussian(noise_multiplier=6.0, sampling_rate=1.0, steps=3)
    assert evaluation_mechanisms(config) == (measured,)
    assert 0.99 * 4 <= epsilon([train, measured], 1e-3).value <= 4
    alone = training_plan(private("privacy.epsilon=4"), run="r", base="b").privacy
    assert alone is not None
    assert alone.noise_multiplier < plan.noise_multiplier


def test_measuring_that_takes_all_of_it_is_refused() -> None:
    config = private("privacy.epsilon=1 private_eval.interval=1 private_eval.noise_multiplier=1")
    with pytest.raises(AntherError, match="measure less often"):
        training_plan(config, run="r", base="b")


def test_what_a_configuration_asks_for() -> None:
    assert measuring(compose("privacy=none private_eval.interval=3"), simulated=True) == EvaluationPolicy()
    assert evaluation_mechanisms(compose("privacy=none private_eval.interval=3")) == ()
    for level in ("example", "device", "both"):
        assert not measuring(compose(f"privacy={level}"), simulated=True).due(1)
    config = private("private_eval.interval=2 data.validation=7 private_eval.clip=0.2")
    assert measuring(config, simulated=False) == EvaluationPolicy(
        every=2, local_noise=EvaluationPrivacy(noise_multiplier=10.0, clip=0.2, pictures=7, delta=1e-3)
    )
    with pytest.raises(AntherError, match="privacy=both"):
        measuring(compose("privacy=both private_eval.interval=2"), simulated=True)


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        ("", 20),
        ("cohort.size=8", 8),
        ("cohort.size=8 cohort.eval_size=5", 5),
    ],
)
def test_the_servers_noise_is_divided_by_how_many_are_asked(overrides: str, devices: int) -> None:
    config = compose(f"privacy=device private_eval.interval=2 {overrides}")
    hidden = measuring(config, simulated=False).central_noise
    assert hidden is not None
    assert hidden.devices == devices
    assert isinstance(hidden.noise(1), SecureNoise)
    simulated = measuring(config, simulated=True).central_noise
    assert simulated is not None
    assert isinstance(simulated.noise(1), SimulatedNoise)


def test_open_losses() -> None:
    found = EvaluationPolicy().summary(2, [raw("a", 1.0, 0.5), raw("b", 0.8, 0.9)], {"refused": 1})
    assert (found.base, found.shared, found.devices) == (0.9, 0.7, {"a": 0.5, "b": 0.9})
    assert (found.gain, found.gain_error, found.epsilon, found.dropped) == (None, None, None, {"refused": 1})
    nobody = EvaluationPolicy().summary(2, [], {})
    assert (nobody.base, nobody.shared) == (None, None)


@pytest.mark.parametrize("lie", [(0.19, 1e11), (0.19, 0.0), (1e-30, 1.0), (1e11, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("others", [2, 19])
def test_one_liar_moves_what_is_measured_within_what_others_tell(lie: tuple[float, float], others: int) -> None:
    honest = [raw(f"d{i}", 0.19 + 0.001 * i, 0.16 + 0.0005 * i) for i in range(others)]
    found = EvaluationPolicy().summary(2, [*honest, raw("mallory", *lie)], {})
    for told, values in (
        (found.base, [reply.base for reply in honest]),
        (found.shared, [reply.shared for reply in honest]),
        (found.improved, [1 - reply.shared / reply.base for reply in honest]),
    ):
        assert min(values) - 1e-9 <= told <= max(values) + 1e-9


def test_a_liar_chooses_no_best_round() -> None:
    """It calls the first round perfect and all others terrible; the last is the best."""
    state = fresh_state()
    for number, loss in enumerate([None, 0.180, 0.172, 0.165, 0.160]):
        replies = [] if loss is None else [raw(f"d{i}", 0.19, loss) for i in range(19)]
        replies += [] if loss is None else [raw("mallory", 0.19, 0.0 if number == 1 else 1e11)]
        told = EvaluationPolicy().summary(number, replies, {})
        state = state.after(Round(number=number, train=None, validation=told, wall_seconds=1.0), state.adapter)
    assert state.best_round == 4


def test_a_noised_gain_counts_as_far_as_noise_can_take_it() -> None:
    private = EvaluationPolicy(every=2, local_noise=PICTURES)
    most = PICTURES.clip * (1 + 8 * PICTURES.noise_multiplier / PICTURES.pictures)
    assert private.summary(2, [gain("a", 1e11)], {}).gain == pytest.approx(most)


def test_gains_that_devices_noised() -> None:
    private = EvaluationPolicy(every=2, local_noise=PICTURES)
    found = private.summary(2, [gain("a", 0.3, 1.5), gain("b", -0.1)], {})
    assert (found.base, found.shared) == (None, None)
    assert found.gain == pytest.approx(0.1)
    assert found.gain_error == pytest.approx(4.0 * 0.1 / (5 * 2**0.5))
    assert (found.devices, found.epsilon, found.spent) == ({"a": 0.3, "b": -0.1}, 1.5, {"a": 1.5, "b": 1.0})
    nobody = private.summary(2, [], {})
    assert (nobody.gain, nobody.gain_error, nobody.epsilon) == (None, None, None)


def test_gains_that_the_server_noises() -> None:
    """Nothing of a device is kept, its clip holds, and the noise is the round's own, once."""
    drawn: list[int] = []
    replies = [raw("a", 1.0, 0.98), raw("b", 1.0, 0.1), raw("c", 0.5, 1e9)]
    found = central_noise(drawn).summary(2, replies, {})
    assert drawn == [2]
    z = SimulatedNoise(seed=3, client="server", round=2, purpose="measure").rounded_gaussian(
        1, 2.0 * STEPS_PER_CLIP
    ).item() / (2.0 * STEPS_PER_CLIP)
    assert found.gain == pytest.approx((0.02 + 0.05 - 0.05 + 2.0 * 0.05 * z) / 4, abs=1e-4)
    assert found.gain_error == pytest.approx(2.0 * 0.05 / 4)
    assert (found.base, found.shared, found.devices, found.spent) == (None, None, {}, {})
    nobody = central_noise().summary(2, [], {})
    assert nobody.gain == pytest.approx(2.0 * 0.05 * z / 4, abs=1e-4)


def test_one_device_more_or_less_changes_the_servers_sum_by_at_most_the_clip() -> None:
    replies = [raw("a", 1.0, 0.5), raw("b", 1.0, 0.99), raw("c", 0.5, 1e9), raw("d", 1e11, 0.0)]
    whole = central_noise().summary(2, replies, {}).gain
    assert whole is not None
    for place in range(len(replies)):
        rest = central_noise().summary(2, [*replies[:place], *replies[place + 1 :]], {}).gain
        assert rest is not None
        assert abs(whole - rest) * 4 <= 0.05 * (1 + 1e-9)


@pytest.mark.parametrize("reply", [raw("a", 1.0, 0.5), gain("a", 0.1)])
def test_only_what_was_asked_for_fits(reply: Evaluation) -> None:
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
def test_half_a_reply_fits_nowhere(reply: Evaluation) -> None:
    assert not EvaluationPolicy().accepts(reply)
    assert not EvaluationPolicy(local_noise=PICTURES).accepts(reply)
