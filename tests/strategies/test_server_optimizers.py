"""Server optimisers against their formulas, number by number."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.compose import compose
from models.lora.adapter import Factors, to_tensors
from protocol.tensor_codec import encode
from server.rounds import checkpoint
from server.rounds.loop import run_rounds
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.build import aggregation
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.flora import FLoRA
from strategies.registry import AGGREGATIONS
from strategies.selection.sample import Sample
from strategies.server_optimizers import FedAvgM, FedOpt
from tests.helpers.fleet import PLAN, SITES, FakeDevice, fresh_state, handle, perform, strategy
from tests.helpers.means import close, rounds, true_mean

ADAM = {"rate": 0.1, "momentum": 0.9, "second": 0.99, "tau": 1e-3}
RULES = {
    "fedavgm": FedAvgM(rate=0.7, momentum=0.9),
    "fedadam": FedOpt(**ADAM, yogi=False),
    "fedyogi": FedOpt(**ADAM, yogi=True),
}


def follow(rule, x, changes):
    """Where a number gets, and by the formulas of the papers."""
    wanted, m, v = x, 0.0, ADAM["tau"] ** 2
    current, memory = {"x.lora_B": torch.tensor([[x]])}, {}
    for change in changes:
        aggregated = {"x.lora_B": current["x.lora_B"] + torch.tensor(change)}
        current, memory = RULES[rule].step(current, aggregated, memory)
        if rule == "fedavgm":
            m = 0.9 * m + change
            wanted += 0.7 * m
            continue
        m = 0.9 * m + 0.1 * change
        v = 0.99 * v + 0.01 * change**2 if rule == "fedadam" else v - 0.01 * change**2 * np.sign(v - change**2)
        wanted += 0.1 * m / (np.sqrt(v) + 1e-3)
    return float(current["x.lora_B"]), wanted


@pytest.mark.parametrize("rule", RULES)
@given(changes=st.lists(st.floats(0.01, 1.0) | st.floats(-1.0, -0.01), min_size=1, max_size=6), x=st.floats(-1, 1))
@settings(max_examples=40)
def test_the_papers_formulas(rule, changes, x):
    found, wanted = follow(rule, x, changes)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)  # each change is a difference of float32


@given(sent=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
@settings(max_examples=100)
def test_a_step_of_one_without_momentum_is_the_mean_to_the_last_bit(sent):
    current, mean = ({"x.lora_A": torch.tensor([[number]])} for number in sent)
    found, memory = FedAvgM(rate=1.0, momentum=0.0).step(current, mean, {"mean": {"x.lora_A": torch.ones(1, 1)}})
    assert torch.equal(found["x.lora_A"], mean["x.lora_A"])
    assert all(tensor.isfinite().all() for tensor in memory["mean"].values() if abs(sent[1] - sent[0]) < 1e38)


@pytest.mark.parametrize("rule", RULES)
def test_what_nobody_trained_stays_with_its_moments(rule):
    current = {"x.lora_B": torch.ones(2, 2), "y.lora_B": torch.ones(2, 2)}
    first = RULES[rule].step(current, current | {"x.lora_B": torch.zeros(2, 2), "y.lora_B": torch.zeros(2, 2)}, {})
    again = RULES[rule].step(first.tensors, first.tensors | {"x.lora_B": torch.ones(2, 2)}, first.memory)
    assert torch.equal(again.tensors["y.lora_B"], first.tensors["y.lora_B"])
    assert all(part["y.lora_B"] is first.memory[name]["y.lora_B"] for name, part in again.memory.items())


@pytest.mark.parametrize("rule", ["fedavgm", "fedyogi"])  # of fedadam even a v that nothing moves fades
def test_ranks_grow_and_shrink(rule):
    """What a smaller rank remembers is the first part of what a larger one does, which began with zeros."""
    generator = torch.Generator().manual_seed(0)

    def drawn(rank):
        shapes = {"x.lora_A": (rank, 3), "x.lora_B": (4, rank)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    small, middle, large, after = drawn(2), drawn(2), drawn(5), drawn(2)
    grown = RULES[rule].step(middle, large, RULES[rule].step(small, middle, {}).memory)
    padded = {
        "x.lora_A": torch.cat([middle["x.lora_A"], large["x.lora_A"][2:]]),
        "x.lora_B": torch.cat([middle["x.lora_B"], torch.zeros(4, 3)], dim=1),
    }
    start = {
        "x.lora_A": torch.cat([small["x.lora_A"], padded["x.lora_A"][2:]]),
        "x.lora_B": torch.cat([small["x.lora_B"], torch.zeros(4, 3)], dim=1),
    }
    wanted = RULES[rule].step(padded, large, RULES[rule].step(start, padded, {}).memory)
    assert all(torch.equal(tensor, wanted.tensors[name]) for name, tensor in grown.tensors.items())
    shrunk = RULES[rule].step(grown.tensors, after, grown.memory)
    assert {tuple(tensor.shape) for tensor in shrunk.memory["mean"].values()} == {(2, 3), (4, 2)}


@pytest.mark.parametrize(
    "wrong",
    [{"rate": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"second": 1.0}, {"tau": 0.0}, {"rate": float("nan")}],
)
def test_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*must be"):
        FedOpt(**ADAM | wrong, yogi=False)


@given(made=rounds(ranks=(1, 4)))
@settings(max_examples=20)
def test_a_mean_of_factors_moves_by_the_mean_of_changes(made):
    """With exact it is the change of aligned factors, and a whole step of it has the mean product."""
    current, updates = made
    rule = Exact(rank=4, max_rank=None, seed=0)
    mean = to_tensors(rule.aggregate(current, updates, round=1).adapter)
    found = FedAvgM(rate=1.0, momentum=0.0).step(to_tensors(current), mean, {}).tensors
    for site in current:
        product = found[f"{site}.lora_B"].double().numpy() @ found[f"{site}.lora_A"].double().numpy()
        assert close(product, true_mean(current, updates, site))


@pytest.fixture
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def run(folder, rule, optimiser, *, state=None, on_round=lambda _: None, seed=3):
    grid = CohortGrid([FakeDevice(name) for name in "abcde"], perform)
    federated = strategy(selection=Sample(size=2, seed=seed), aggregation=rule, optimiser=optimiser)
    return run_rounds(
        grid=grid, strategy=federated, state=state or fresh_state(), rounds=4, checkpoints=folder, on_round=on_round
    )


def told(state):
    return encode(to_tensors(state.adapter)), [replace(done, wall_seconds=0.0) for done in state.history]


@pytest.mark.usefixtures("_fake_logic")
@pytest.mark.parametrize("rule", [Exact(rank=PLAN.rank, max_rank=5, seed=0), FedIT()])
def test_through_the_round_loop_killed_and_resumed_it_is_the_same_run(tmp_path, rule):
    optimiser = RULES["fedyogi"]
    whole = run(tmp_path / "whole", rule, optimiser)

    class Killed(BaseException):
        pass

    def die(round):
        if round.number == 2:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "parts", rule, optimiser, on_round=die)
    resumed = run(tmp_path / "parts", rule, optimiser, state=checkpoint.load(tmp_path / "parts", sites=SITES))
    assert told(resumed) == told(whole)
    assert resumed.memory.keys() == {"mean", "square"}
    assert encode(resumed.memory["square"]) == encode(whole.memory["square"])
    forgotten = replace(checkpoint.load(tmp_path / "whole", sites=SITES), memory={})
    assert told(forgotten)[0] == told(whole)[0]  # the adapter needs no memory, the next round would
    plain = [run(tmp_path / name, rule, one) for name, one in {"a": None, "b": FedAvgM(rate=1, momentum=0)}.items()]
    assert told(plain[0]) == told(plain[1])
    assert told(plain[0])[0] != told(whole)[0]


@pytest.mark.usefixtures("_fake_logic")
def test_a_step_that_devices_would_refuse_is_not_taken_and_not_remembered(tmp_path):
    state = run(tmp_path, FedIT(), FedAvgM(rate=1e6, momentum=0.9))
    assert encode(to_tensors(state.adapter)) == encode(to_tensors(fresh_state().adapter))
    assert state.memory == {}


def built(name):
    given = f"aggregation={name} adapter.shared.rank=3"
    return aggregation(compose(given))


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_rule_that_turns_factors_says_so(name):
    """Of a round that changed nothing, from factors that it might have left itself."""
    rule = built(name)
    generator = torch.Generator().manual_seed(0)
    current = {
        site: Factors(
            torch.linalg.qr(torch.randn(5, 3, generator=generator)).Q.T, torch.randn(4, 3, generator=generator)
        )
        for site in "xy"
    }
    found = rule.aggregate(current, [(current, 1.0)] * 2, round=1).adapter
    stays = all(
        len(found[site].a) == 3 and torch.allclose(now, then, atol=1e-4)
        for site in "xy"
        for now, then in zip(found[site], current[site], strict=True)
    )
    assert stays == (rule.sensitivity.turned is None)


def test_factors_that_are_new_each_round_have_no_optimiser():
    with pytest.raises(ValueError, match="stay the same: every round begins with fresh ones"):
        strategy(aggregation=FLoRA(rank=3, seed=0), optimiser=RULES["fedadam"])
