"""Server optimizers against their formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Factors, to_tensors
from protocol.tensor_codec import encode
from server.rounds import checkpoint
from server.rounds.loop import run_rounds
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.flora import FLoRA
from strategies.factory.aggregation import build_aggregation
from strategies.registry import AGGREGATIONS
from strategies.selection.sample import Sample
from strategies.server_optimizers import FedAvgM, FedOpt, as_stored
from tests.helpers.configs import compose
from tests.helpers.fleet import PLAN, SITES, FakeDevice, fresh_state, handle, perform, strategy
from tests.helpers.means import close, rounds, true_mean

ADAM = {"lr": 0.1, "momentum": 0.9, "beta2": 0.99, "tau": 1e-3}
RULES = {
    "fedavgm": FedAvgM(lr=0.7, momentum=0.9),
    "fedadam": FedOpt(**ADAM, yogi=False),
    "fedyogi": FedOpt(**ADAM, yogi=True),
}


@pytest.mark.parametrize("sign", [1, -1])
def test_stored_moments_have_no_subnormal_numbers(sign):
    """Around the smallest normal number 2⁻¹²⁶, bit by bit, and zero."""
    bits = np.concatenate([np.arange(2**23 - 1000, 2**23 + 1000), np.arange(1000)]).astype(np.int32)
    values = sign * bits.view(np.float32)
    expected = np.where(bits < 2**23, np.float32(0.0), values)
    stored = as_stored(torch.from_numpy(values.astype(np.float64))).numpy()
    assert np.array_equal(stored.view(np.int32), expected.view(np.int32))


def run_steps(rule, x, changes):
    """Return x after these changes, and the value by the formulas of the papers."""
    expected, m, v = x, 0.0, ADAM["tau"] ** 2
    current, memory = {"x.lora_B": torch.tensor([[x]])}, {}
    for change in changes:
        aggregated = {"x.lora_B": current["x.lora_B"] + torch.tensor(change)}
        current, memory = RULES[rule].step(current, aggregated, memory)
        if rule == "fedavgm":
            m = 0.9 * m + change
            expected += 0.7 * m
            continue
        m = 0.9 * m + 0.1 * change
        v = 0.99 * v + 0.01 * change**2 if rule == "fedadam" else v - 0.01 * change**2 * np.sign(v - change**2)
        expected += 0.1 * m / (np.sqrt(v) + 1e-3)
    return float(current["x.lora_B"]), expected


@pytest.mark.parametrize("rule", RULES)
@given(changes=st.lists(st.floats(0.01, 1.0) | st.floats(-1.0, -0.01), min_size=1, max_size=6), x=st.floats(-1, 1))
def test_steps_match_the_papers(rule, changes, x):
    result, expected = run_steps(rule, x, changes)
    assert result == pytest.approx(expected, rel=1e-3, abs=1e-4)  # each change is a float32 difference


@given(sent=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_full_step_without_momentum_is_the_mean(sent):
    current, mean = ({"x.lora_A": torch.tensor([[number]])} for number in sent)
    result, memory = FedAvgM(lr=1.0, momentum=0.0).step(current, mean, {"mean": {"x.lora_A": torch.ones(1, 1)}})
    assert torch.equal(result["x.lora_A"], mean["x.lora_A"])
    assert all(tensor.isfinite().all() for tensor in memory["mean"].values() if abs(sent[1] - sent[0]) < 1e38)


@pytest.mark.parametrize("rule", RULES)
def test_untrained_tensors_keep_their_moments(rule):
    current = {"x.lora_B": torch.ones(2, 2), "y.lora_B": torch.ones(2, 2)}
    first = RULES[rule].step(current, current | {"x.lora_B": torch.zeros(2, 2), "y.lora_B": torch.zeros(2, 2)}, {})
    second = RULES[rule].step(first.tensors, first.tensors | {"x.lora_B": torch.ones(2, 2)}, first.state)
    assert torch.equal(second.tensors["y.lora_B"], first.tensors["y.lora_B"])
    assert all(part["y.lora_B"] is first.state[name]["y.lora_B"] for name, part in second.state.items())


@pytest.mark.parametrize("rule", ["fedavgm", "fedyogi"])  # with fedadam v decays even without changes
def test_ranks_grow_and_shrink(rule):
    """The state of a smaller rank is the first part of that of a larger one, which starts with zeros."""
    generator = torch.Generator().manual_seed(0)

    def random_tensors(rank):
        shapes = {"x.lora_A": (rank, 3), "x.lora_B": (4, rank)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    small, middle, large, after = random_tensors(2), random_tensors(2), random_tensors(5), random_tensors(2)
    grown = RULES[rule].step(middle, large, RULES[rule].step(small, middle, {}).state)
    padded = {
        "x.lora_A": torch.cat([middle["x.lora_A"], large["x.lora_A"][2:]]),
        "x.lora_B": torch.cat([middle["x.lora_B"], torch.zeros(4, 3)], dim=1),
    }
    start = {
        "x.lora_A": torch.cat([small["x.lora_A"], padded["x.lora_A"][2:]]),
        "x.lora_B": torch.cat([small["x.lora_B"], torch.zeros(4, 3)], dim=1),
    }
    expected = RULES[rule].step(padded, large, RULES[rule].step(start, padded, {}).state)
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in grown.tensors.items())
    shrunk = RULES[rule].step(grown.tensors, after, grown.state)
    assert {tuple(tensor.shape) for tensor in shrunk.state["mean"].values()} == {(2, 3), (4, 2)}


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"beta2": 1.0}, {"tau": 0.0}, {"lr": float("nan")}],
)
def test_values_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*must be"):
        FedOpt(**ADAM | options, yogi=False)


@given(round_=rounds(ranks=(1, 4)))
def test_full_step_has_the_mean_product(round_):
    """For exact, the change is that of aligned factors, and a full step has the mean product."""
    current, updates = round_
    rule = Exact(rank=4, max_rank=None, seed=0)
    mean = to_tensors(rule.aggregate(current, updates, round=1).adapter)
    result = FedAvgM(lr=1.0, momentum=0.0).step(to_tensors(current), mean, {}).tensors
    for site in current:
        product = result[f"{site}.lora_B"].double().numpy() @ result[f"{site}.lora_A"].double().numpy()
        assert close(product, true_mean(current, updates, site))


@pytest.fixture
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def run(folder, rule, optimizer, *, state=None, on_round=lambda _: None, seed=3):
    grid = CohortGrid([FakeDevice(name) for name in "abcde"], perform)
    federated = strategy(selection=Sample(size=2, seed=seed), aggregation=rule, server_optimizer=optimizer)
    return run_rounds(
        grid=grid, strategy=federated, state=state or fresh_state(), rounds=4, checkpoints=folder, on_round=on_round
    )


def results(state):
    return encode(to_tensors(state.adapter)), [replace(done, wall_seconds=0.0) for done in state.history]


@pytest.mark.usefixtures("_fake_logic")
@pytest.mark.parametrize("rule", [Exact(rank=PLAN.rank, max_rank=5, seed=0), FedIT()])
def test_resumed_run_is_identical(tmp_path, rule):
    optimizer = RULES["fedyogi"]
    uninterrupted = run(tmp_path / "whole", rule, optimizer)

    class KilledRun(BaseException):
        pass

    def die(round):
        if round.number == 2:
            raise KilledRun

    with pytest.raises(KilledRun):
        run(tmp_path / "parts", rule, optimizer, on_round=die)
    resumed = run(tmp_path / "parts", rule, optimizer, state=checkpoint.load(tmp_path / "parts", sites=SITES))
    assert results(resumed) == results(uninterrupted)
    assert resumed.memory.keys() == {"mean", "square"}
    assert encode(resumed.memory["square"]) == encode(uninterrupted.memory["square"])
    without_state = replace(checkpoint.load(tmp_path / "whole", sites=SITES), memory={})
    assert results(without_state)[0] == results(uninterrupted)[0]  # the adapter is stored separately from the state
    without_momentum = [
        run(tmp_path / name, rule, one) for name, one in {"a": None, "b": FedAvgM(lr=1, momentum=0)}.items()
    ]
    assert results(without_momentum[0]) == results(without_momentum[1])
    assert results(without_momentum[0])[0] != results(uninterrupted)[0]


@pytest.mark.usefixtures("_fake_logic")
def test_oversized_step_is_not_taken(tmp_path):
    state = run(tmp_path, FedIT(), FedAvgM(lr=1e6, momentum=0.9))
    assert encode(to_tensors(state.adapter)) == encode(to_tensors(fresh_state().adapter))
    assert state.memory == {}


def build_rule(name):
    given = f"aggregation={name} adapter.shared.rank=3"
    return build_aggregation(compose(given))


@pytest.mark.integration
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_rotation_is_declared(name):
    """Aggregate unchanged updates, from factors that the rule could have produced."""
    rule = build_rule(name)
    generator = torch.Generator().manual_seed(0)
    current = {
        site: Factors(
            torch.linalg.qr(torch.randn(5, 3, generator=generator)).Q.T, torch.randn(4, 3, generator=generator)
        )
        for site in "xy"
    }
    result = rule.aggregate(current, [(current, 1.0)] * 2, round=1).adapter
    stays = all(
        len(result[site].a) == 3 and torch.allclose(now, before, atol=1e-4)
        for site in "xy"
        for now, before in zip(result[site], current[site], strict=True)
    )
    assert stays == (rule.sensitivity.rotation_reason is None)


def test_server_optimizer_requires_persistent_directions():
    with pytest.raises(ValueError, match="directions persist, and with flora every round begins with fresh ones"):
        strategy(aggregation=FLoRA(rank=3, seed=0), server_optimizer=RULES["fedadam"])
