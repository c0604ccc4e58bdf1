"""Replays, against dense products in float64, and through the real loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AntherError
from models.lora.adapter import Factors, Site, to_tensors
from models.lora.lora_xs import load_bases, zero_adapter
from protocol import quantization
from protocol.messages import Update
from server.rounds import checkpoint
from server.rounds.fedbuff import FedBuffRunner
from server.rounds.loop import run_rounds
from server.rounds.state import RunState
from server.rounds.sync import RoundLimits
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsb import FedSB
from strategies.aggregation.fedsvd import FedSVD
from strategies.aggregation.ffa import FFA
from strategies.aggregation.rolora import RoLoRA
from strategies.factory.aggregation import build_aggregation, build_replay_filter
from strategies.factory.combination import check_configuration
from strategies.factory.full_plan import training_plan
from strategies.factory.strategy import build
from strategies.robust.replay import ReplayFilter, draw_probes, relative_distances, sketch
from strategies.round.validation import ReplyRejectedError
from tests.helpers.configs import compose
from tests.helpers.fleet import PLAN, FakeDevice, bases_file, fresh_state, handle, perform, strategy
from tests.helpers.fleet import SITES as FLEET_SITES
from tests.helpers.means import dense, random_adapter
from tests.helpers.timed_fleet import timed_grid, virtual_device
from tests.strategies.robust.test_gram import refactored

SHAPES = {"x": (48, 40), "y": (30, 60), "z": (24, 24)}  # in, out
SITES = {name: Site(*shape) for name, shape in SHAPES.items()}


def adapter(seed, *, size=4, at=SHAPES):
    return random_adapter(size, seed, sites={site: SHAPES[site] for site in at})


def moved(start, seed, by=0.3):
    """Move every factor of a start by a small step."""
    size, at = len(next(iter(start.values())).a), list(start)
    steps = random_adapter(size, seed, scale=by, sites={site: SHAPES[site] for site in at})
    return {site: Factors(*(old + new for old, new in zip(start[site], steps[site], strict=True))) for site in at}


def truncate(factors_of, size):
    return {site: Factors(a[:size], b[:, :size]) for site, (a, b) in factors_of.items()}


class FilterHarness:
    """Replay filter with its state."""

    def __init__(self, **settings):
        self.rule, self.state, self.round_sketches = ReplayFilter(SITES, **{"seed": 1} | settings), {}, []

    def accepts(self, current, device, trained):
        try:
            self.rule.check(current, device, trained, self.state, self.round_sketches)
        except ReplyRejectedError:
            return False
        return True

    def next_round(self):
        self.state, self.round_sketches = self.rule.remember(self.state, self.round_sketches), []


@pytest.fixture
def server():
    """Filter after a round in which device `a` sent the update of seed 1."""
    result = FilterHarness()
    assert result.accepts(START, "a", SENT)
    result.next_round()
    return result


START, SENT, LATER = adapter(0), moved(adapter(0), 1), moved(adapter(0), 2)


@given(st.integers(0, 2**31), st.sets(st.sampled_from(sorted(SHAPES)), min_size=1), st.floats(0.05, 3.0))
def test_distances_approximate_dense_products(seed, at, by):
    start, before, probes = adapter(seed), adapter(seed + 1, size=3, at=at), draw_probes(SITES, 2000, seed)
    now = moved(start, seed + 2, by)
    distance = np.linalg.norm(np.concatenate([(dense(now, s) - dense(before, s)).ravel() for s in sorted(at)]))
    change = np.linalg.norm(np.concatenate([(dense(now, s) - dense(start, s)).ravel() for s in sorted(at)]))
    new, earlier, start_sketch = (sketch(each, SITES, probes) for each in (now, before, start))
    result = relative_distances(new, earlier[None], (new - start_sketch)[:, 1:].square().sum(1))
    assert float(result) == pytest.approx(distance / change, rel=0.2)


def test_probes_depend_on_the_product():
    probes = draw_probes(SITES, 5, 3)
    result = sketch(SENT, SITES, probes)
    for row, site, (u, v) in zip(result, SITES, probes, strict=True):
        assert set(u.unique().tolist()) == {-1.0, 1.0}
        assert np.allclose(row[1:], np.einsum("no,oi,ni->n", u.numpy(), dense(SENT, site), v.numpy()))
    assert torch.allclose(sketch(refactored(SENT, 7), SITES, probes), result, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sketch(SENT, SITES, draw_probes(SITES, 5, 4)), result, rtol=0.1)


def test_first_round_accepts_equal_updates():
    server = FilterHarness()
    assert all(server.accepts(START, name, SENT) for name in "abc")  # otherwise the order of arrival would decide


def test_replay_is_rejected_in_any_factors_from_any_device(server):
    assert not server.accepts(START, "a", SENT)
    assert not server.accepts(adapter(9), "a", refactored(SENT, 3))  # the server's adapter has changed since
    assert not server.accepts(START, "b", SENT)
    assert server.accepts(START, "a", LATER)
    assert server.accepts(START, "c", moved(START, 3))


def test_training_on_its_own_result_is_no_replay(server):
    assert server.accepts(SENT, "a", moved(SENT, 2))  # the only client: its update is the next adapter
    server.next_round()
    assert server.accepts(SENT, "a", moved(SENT, 3))


def test_unchanged_adapter_is_no_replay(server):
    assert server.accepts(SENT, "a", SENT)


@pytest.mark.parametrize("precision", quantization.PRECISIONS)
def test_quantization_does_not_hide_a_replay(server, precision):
    generator = torch.Generator().manual_seed(5)

    def rounded(start, trained):
        before, after = to_tensors(start), to_tensors(trained)
        data = quantization.encode({name: after[name] - before[name] for name in after}, precision, generator)
        change = quantization.decode(data, {name: tuple(tensor.shape) for name, tensor in after.items()}, precision)
        return {
            site: Factors(a + change[f"{site}.lora_A"], b + change[f"{site}.lora_B"]) for site, (a, b) in start.items()
        }

    now = moved(START, 8, by=0.05)
    assert not server.accepts(now, "a", rounded(now, SENT))
    assert server.accepts(now, "a", rounded(now, moved(now, 2)))


def test_noise_needed_to_hide_a_replay(server):
    def near(by):
        """Add noise to the product, relative to its distance from the start."""
        result = {}
        for number, site in enumerate(SENT):
            other = torch.randn(*dense(SENT, site).shape, generator=torch.Generator().manual_seed(number)).double()
            other *= by * np.linalg.norm(dense(SENT, site) - dense(START, site)) / other.norm()
            result[site] = Factors(torch.eye(SHAPES[site][0]).double(), torch.as_tensor(dense(SENT, site)) + other)
        return result

    start = {site: Factors(torch.eye(SHAPES[site][0]).double(), torch.as_tensor(dense(START, site))) for site in START}
    assert server.accepts(start, "b", near(0.9))
    assert not server.accepts(start, "a", near(0.3))
    assert not server.accepts(start, "a", near(0.6))  # near to the rejected update


def test_comparison_uses_common_sites(server):
    other = {**moved(START, 2), "x": SENT["x"]}
    assert not server.accepts(START, "b", {"x": SENT["x"]})
    assert server.accepts(START, "a", other)  # partly different, so no replay
    server.next_round()
    assert not server.accepts(START, "a", {site: other[site] for site in ("y", "z")})
    distance = FilterHarness()
    assert distance.accepts(START, "a", {"x": SENT["x"]})
    distance.next_round()
    assert distance.accepts(START, "a", {site: SENT[site] for site in ("y", "z")})  # no common site
    assert not distance.accepts(START, "a", {**LATER, "x": SENT["x"]})  # equal at the common site


def test_few_common_probes_decide_nothing():
    many = {f"s{number}": (9, 8) for number in range(300)}  # two probes at each
    sites, start = {name: Site(*shape) for name, shape in many.items()}, random_adapter(2, 0, sites=many)
    sent = random_adapter(2, 1, sites=many)

    def send(count):
        rule, round_sketches = ReplayFilter(sites, seed=1), []
        part = {name: sent[name] for name in list(many)[:count]}
        rule.check(start, "a", sent, {}, round_sketches)
        rule.check(start, "a", part, rule.remember({}, round_sketches), [])

    send(31)
    with pytest.raises(ReplyRejectedError, match="a: nearly equals an update"):
        send(32)


def test_replays_of_other_ranks(server):
    """Devices with fewer directions are compared by their own part, and padding with zeros does not hide a replay."""
    small = moved(truncate(START, 2), 4)
    assert server.accepts(START, "b", small)
    server.next_round()
    padded = {site: Factors(torch.cat([a, a]), torch.cat([b, 0 * b], dim=1)) for site, (a, b) in small.items()}
    assert not server.accepts(START, "b", padded)
    untrained = {site: Factors(a[:0], b[:, :0]) for site, (a, b) in START.items()}
    assert server.accepts(START, "b", untrained)


def test_within_a_round_only_own_updates_are_compared(server):
    assert server.accepts(START, "a", LATER)
    assert server.accepts(START, "b", LATER)
    assert not server.accepts(START, "a", LATER)


def test_capacity_keeps_the_latest_sketches():
    server = FilterHarness(capacity=2 * 3 * (1 + 171))  # two sketches
    assert server.accepts(START, "a", SENT)
    server.next_round()
    for number in range(3):
        assert not server.accepts(START, "a", SENT)
        assert server.accepts(START, "b", moved(START, 10 + number))
        server.next_round()
        assert server.state["replay"]["sketches"].shape == (2, 3, 172)
    for number in range(2):
        assert server.accepts(START, "b", moved(START, 20 + number))
        server.next_round()
    assert server.accepts(START, "a", SENT)


def test_seed_is_part_of_the_state(server):
    other = FilterHarness(seed=None)
    other.state = server.state
    assert not other.accepts(START, "a", SENT)
    assert other.accepts(START, "a", LATER)
    seeds = [ReplayFilter(SITES).remember({}, [])["replay"]["seed"] for _ in range(2)]
    assert not torch.equal(*seeds)
    largest_seed = ReplayFilter(SITES, seed=2**63 - 1)
    assert ReplayFilter(SITES, seed=0)._stored_seed(largest_seed.remember({}, [])["replay"]) == 2**63 - 1


def replay_first_payload():
    """Make a misbehavior that sends the first payload in every round."""
    first = []

    def misbehave(reply):
        if not isinstance(reply, Update):
            return reply
        first.append(reply.adapter)
        return replace(reply, adapter=first[0])

    return misbehave


@pytest.fixture
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def fleet(names="ab", *, bad="x"):
    return [FakeDevice(name) for name in names] + [FakeDevice(name, misbehave=replay_first_payload()) for name in bad]


def run(folder, devices, *, rounds, state=None, rule=None, seed=1, **settings):
    federated = strategy(
        aggregation=rule or Exact(rank=3, max_rank=None, seed=0),
        replay_filter=ReplayFilter(FLEET_SITES, seed=seed),
        **settings,
    )
    return run_rounds(
        grid=CohortGrid(devices, perform),
        strategy=federated,
        state=state or fresh_state(),
        rounds=rounds,
        checkpoints=folder,
        on_round=lambda _: None,
    )


def dropped(state):
    return [done.train.dropped for done in state.history[1:]]


def bases_of(folder):
    return load_bases(bases_file(folder), FLEET_SITES, PLAN.rank)


@pytest.mark.usefixtures("_fake_logic")
@pytest.mark.parametrize("rule", [Exact(rank=3, max_rank=None, seed=0), FedIT(), FFA(), FedSB()], ids=type)
def test_run_rejects_and_counts_replays(tmp_path, rule):
    lora_xs_bases = bases_of(tmp_path) if isinstance(rule, FedSB) else None
    state = RunState.start(run="run", private=False, adapter=zero_adapter(lora_xs_bases)) if lora_xs_bases else None
    result = run(tmp_path / "runs", fleet(), rounds=4, rule=rule, lora_xs_bases=lora_xs_bases, state=state)
    assert dropped(result) == [{}, *[{"replayed": 1}] * 3]
    assert [done.train.replied for done in result.history[1:]] == [3, 2, 2, 2]


@pytest.mark.usefixtures("_fake_logic")
@pytest.mark.parametrize("rule", [FedSVD(seed=0), RoLoRA(), FedIT()], ids=type)
def test_honest_devices_are_accepted(tmp_path, rule):
    assert dropped(run(tmp_path, fleet("abcd", bad=""), rounds=6, rule=rule)) == [{}] * 6


@pytest.mark.usefixtures("_fake_logic")
def test_single_client(tmp_path):
    result = run(tmp_path / "bad", fleet(""), rounds=3)
    assert dropped(result) == [{}, {"replayed": 1}, {"replayed": 1}]
    first = run(tmp_path / "once", fleet(""), rounds=1)
    assert all(torch.equal(result.adapter[site].b, first.adapter[site].b) for site in FLEET_SITES)
    assert dropped(run(tmp_path / "good", fleet("a", bad=""), rounds=5)) == [{}] * 5


@pytest.mark.usefixtures("_fake_logic")
def test_resumed_run_recognizes_replays(tmp_path):
    devices = fleet()
    uninterrupted = run(tmp_path / "whole", fleet(), rounds=4)
    run(tmp_path / "parts", devices, rounds=2)
    saved = checkpoint.load(tmp_path / "parts", sites=FLEET_SITES)
    resumed = run(tmp_path / "parts", devices, rounds=4, state=saved, seed=None)
    assert dropped(resumed) == dropped(uninterrupted) == [{}, *[{"replayed": 1}] * 3]
    assert all(torch.equal(resumed.adapter[site].b, uninterrupted.adapter[site].b) for site in FLEET_SITES)
    first, second = (state.memory["replay"] for state in (resumed, uninterrupted))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("_fake_logic")
def test_updates_below_the_quorum_are_remembered(tmp_path):
    assert dropped(run(tmp_path, fleet(), rounds=2, quorum=4)) == [{}, {"replayed": 1}]


@pytest.mark.usefixtures("_fake_logic")
def test_asynchronous_rounds(tmp_path):
    """A fast device sends twice in a round, a slow one an update of an older adapter."""
    grid, lives = timed_grid(
        tmp_path,
        virtual_device("a", speed=4.0),
        virtual_device("b", speed=0.4),
        virtual_device("x", speed=4.0),
        devices=fleet(),
    )
    federated, limits = (
        strategy(replay_filter=ReplayFilter(FLEET_SITES, seed=1)),
        RoundLimits(clock=lives.clock, timeout=1000.0),
    )
    result = run_rounds(
        grid=grid,
        strategy=federated,
        state=fresh_state(),
        rounds=4,
        checkpoints=tmp_path,
        on_round=lambda _: None,
        limits=limits,
        round_runner=FedBuffRunner(grid, federated, limits, size=4, concurrency=3),
        min_devices=0,
    )
    assert dropped(result) == [{"replayed": 1}] * 4  # not asked again in the round
    assert result.devices["x"].rounds == 1
    assert result.devices["a"].rounds > 4
    assert result.devices["b"].rounds > 0


def test_incompatible_settings_are_refused():
    with pytest.raises(AntherError, match=r"^robust: replay .* put it first"):
        check_configuration(compose("robust=[norm_bound,replay]"))
    config = compose("aggregation=fedsa 'robust=[replay]'")
    with pytest.raises(AntherError, match=r"robust: .* aggregation=fedsa every device keeps its own B"):
        check_configuration(config)
    with pytest.raises(ValueError, match="every device keeps its own B"):
        strategy(aggregation=FedSA(), replay_filter=ReplayFilter(FLEET_SITES))
    config = compose("aggregation=fedit privacy=device 'robust=[replay]'")
    with pytest.raises(
        AntherError, match="robust rule replay breaks the sensitivity bound: updates that any device sent"
    ):
        build(config, training_plan(config, run="r", base="b"), FLEET_SITES, accept_simulated=True)
    with pytest.raises(ValueError, match="under 1"):
        ReplayFilter(FLEET_SITES, threshold=1.0)


def test_filter_is_built_if_it_is_named():
    config = compose("aggregation=exact 'robust=[replay]'")
    rule = build_aggregation(config)
    assert isinstance(rule, Exact)
    assert isinstance(build_replay_filter(config, FLEET_SITES, seed=1), ReplayFilter)
    assert build_replay_filter(compose("aggregation=exact"), FLEET_SITES, seed=1) is None
