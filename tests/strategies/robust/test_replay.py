"""Replays, against dense products in float64, and through the real loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AntherError
from conf.compose import compose
from conf.schemas.rounds import RobustConfig
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
from strategies.aggregation.build import aggregation, replay
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsb import FedSB
from strategies.aggregation.fedsvd import FedSVD
from strategies.aggregation.ffa import FFA
from strategies.aggregation.rolora import RoLoRA
from strategies.build import build
from strategies.fedbuff import rebase_product
from strategies.planning.full_plan import training_plan
from strategies.robust.replay import ReplayFilter, draw, relative_distances, sketch
from strategies.round.validation import ReplyRejectedError
from tests.helpers.fleet import PLAN, FakeDevice, bases_file, fresh_state, handle, perform, strategy
from tests.helpers.fleet import SITES as FLEET_SITES
from tests.helpers.means import dense, random_adapter
from tests.helpers.timed_fleet import timed_grid, virtual_device
from tests.strategies.robust.test_gram import turned

SHAPES = {"x": (48, 40), "y": (30, 60), "z": (24, 24)}  # in, out
SITES = {name: Site(*shape) for name, shape in SHAPES.items()}


def adapter(seed, *, size=4, at=SHAPES):
    return random_adapter(size, seed, sites={site: SHAPES[site] for site in at})


def moved(start, seed, by=0.3):
    """Trained of a start: every factor a little further."""
    size, at = len(next(iter(start.values())).a), list(start)
    steps = random_adapter(size, seed, scale=by, sites={site: SHAPES[site] for site in at})
    return {site: Factors(*(old + new for old, new in zip(start[site], steps[site], strict=True))) for site in at}


def of_smaller(given, size):
    return {site: Factors(a[:size], b[:, :size]) for site, (a, b) in given.items()}


class Server:
    """A rule and what it remembers."""

    def __init__(self, **settings):
        self.rule, self.memory, self.since = ReplayFilter(SITES, **{"seed": 1} | settings), {}, []

    def lets_in(self, current, device, trained):
        try:
            self.rule.check(current, device, trained, self.memory, self.since)
        except ReplyRejectedError:
            return False
        return True

    def next_round(self):
        self.memory, self.since = self.rule.remember(self.memory, self.since), []


@pytest.fixture
def server():
    """After a round in which device `a` sent what follows from seed 1."""
    found = Server()
    assert found.lets_in(START, "a", SENT)
    found.next_round()
    return found


START, SENT, LATER = adapter(0), moved(adapter(0), 1), moved(adapter(0), 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sets(st.sampled_from(sorted(SHAPES)), min_size=1), st.floats(0.05, 3.0))
def test_ratios_are_about_those_of_dense_products(seed, at, by):
    start, before, probes = adapter(seed), adapter(seed + 1, size=3, at=at), draw(SITES, 2000, seed)
    now = moved(start, seed + 2, by)
    apart = np.linalg.norm(np.concatenate([(dense(now, s) - dense(before, s)).ravel() for s in sorted(at)]))
    went = np.linalg.norm(np.concatenate([(dense(now, s) - dense(start, s)).ravel() for s in sorted(at)]))
    one, seen, begun = (sketch(each, SITES, probes) for each in (now, before, start))
    found = relative_distances(one, seen[None], (one - begun)[:, 1:].square().sum(1))
    assert float(found) == pytest.approx(apart / went, rel=0.2)


def test_probes_are_of_the_product():
    probes = draw(SITES, 5, 3)
    found = sketch(SENT, SITES, probes)
    for row, site, (u, v) in zip(found, SITES, probes, strict=True):
        assert set(u.unique().tolist()) == {-1.0, 1.0}
        assert np.allclose(row[1:], np.einsum("no,oi,ni->n", u.numpy(), dense(SENT, site), v.numpy()))
    assert torch.allclose(sketch(turned(SENT, 7), SITES, probes), found, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sketch(SENT, SITES, draw(SITES, 5, 4)), found, rtol=0.1)


def test_in_the_first_round_nothing_was_sent_before():
    server = Server()
    assert all(server.lets_in(START, name, SENT) for name in "abc")  # who is first would else decide


def test_what_was_sent_before_is_refused_in_whichever_factors_and_from_whomever(server):
    assert not server.lets_in(START, "a", SENT)
    assert not server.lets_in(adapter(9), "a", turned(SENT, 3))  # the server went elsewhere since
    assert not server.lets_in(START, "b", SENT)
    assert server.lets_in(START, "a", LATER)
    assert server.lets_in(START, "c", moved(START, 3))


def test_who_trains_from_where_it_arrived_is_no_replay(server):
    assert server.lets_in(SENT, "a", moved(SENT, 2))  # the only client: what it sent is the next adapter
    server.next_round()
    assert server.lets_in(SENT, "a", moved(SENT, 3))


def test_who_does_not_move_repeats_what_the_server_sent(server):
    assert server.lets_in(SENT, "a", SENT)


@pytest.mark.parametrize("precision", quantization.PRECISIONS)
def test_rounding_hides_no_replay(server, precision):
    generator = torch.Generator().manual_seed(5)

    def rounded(start, trained):
        before, after = to_tensors(start), to_tensors(trained)
        data = quantization.encode({name: after[name] - before[name] for name in after}, precision, generator)
        change = quantization.decode(data, {name: tuple(tensor.shape) for name, tensor in after.items()}, precision)
        return {
            site: Factors(a + change[f"{site}.lora_A"], b + change[f"{site}.lora_B"]) for site, (a, b) in start.items()
        }

    now = moved(START, 8, by=0.05)
    assert not server.lets_in(now, "a", rounded(now, SENT))
    assert server.lets_in(now, "a", rounded(now, moved(now, 2)))


def test_how_much_noise_an_attacker_has_to_add(server):
    def near(by):
        """The product so much of its way from the start elsewhere."""
        found = {}
        for number, site in enumerate(SENT):
            other = torch.randn(*dense(SENT, site).shape, generator=torch.Generator().manual_seed(number)).double()
            other *= by * np.linalg.norm(dense(SENT, site) - dense(START, site)) / other.norm()
            found[site] = Factors(torch.eye(SHAPES[site][0]).double(), torch.as_tensor(dense(SENT, site)) + other)
        return found

    start = {site: Factors(torch.eye(SHAPES[site][0]).double(), torch.as_tensor(dense(START, site))) for site in START}
    assert server.lets_in(start, "b", near(0.9))
    assert not server.lets_in(start, "a", near(0.3))
    assert not server.lets_in(start, "a", near(0.6))  # which is near to what was refused


def test_over_the_sites_that_two_updates_have_in_common(server):
    other = {**moved(START, 2), "x": SENT["x"]}
    assert not server.lets_in(START, "b", {"x": SENT["x"]})
    assert server.lets_in(START, "a", other)  # a part of it is no replay
    server.next_round()
    assert not server.lets_in(START, "a", {site: other[site] for site in ("y", "z")})
    apart = Server()
    assert apart.lets_in(START, "a", {"x": SENT["x"]})
    apart.next_round()
    assert apart.lets_in(START, "a", {site: SENT[site] for site in ("y", "z")})  # nothing in common
    assert not apart.lets_in(START, "a", {**LATER, "x": SENT["x"]})  # where they have, it is the same


def test_of_few_probes_nothing_is_said():
    many = {f"s{number}": (9, 8) for number in range(300)}  # two probes at each
    sites, start = {name: Site(*shape) for name, shape in many.items()}, random_adapter(2, 0, sites=many)
    sent = random_adapter(2, 1, sites=many)

    def again(count):
        rule, since = ReplayFilter(sites, seed=1), []
        few = {name: sent[name] for name in list(many)[:count]}
        rule.check(start, "a", sent, {}, since)
        rule.check(start, "a", few, rule.remember({}, since), [])

    again(31)
    with pytest.raises(ReplyRejectedError, match="a: nearly what was sent"):
        again(32)


def test_over_ranks(server):
    """A device that was asked for fewer directions is held against what it was sent of them, and zeros hide nothing."""
    small = moved(of_smaller(START, 2), 4)
    assert server.lets_in(START, "b", small)
    server.next_round()
    padded = {site: Factors(torch.cat([a, a]), torch.cat([b, 0 * b], dim=1)) for site, (a, b) in small.items()}
    assert not server.lets_in(START, "b", padded)
    nothing = {site: Factors(a[:0], b[:, :0]) for site, (a, b) in START.items()}
    assert server.lets_in(START, "b", nothing)


def test_of_a_round_that_goes_on_a_device_is_held_against_itself(server):
    assert server.lets_in(START, "a", LATER)
    assert server.lets_in(START, "b", LATER)
    assert not server.lets_in(START, "a", LATER)


def test_memory_is_bounded_and_whoever_goes_on_replaying_stays_in_it():
    server = Server(held=2 * 3 * (1 + 171))  # two sketches
    assert server.lets_in(START, "a", SENT)
    server.next_round()
    for number in range(3):
        assert not server.lets_in(START, "a", SENT)
        assert server.lets_in(START, "b", moved(START, 10 + number))
        server.next_round()
        assert server.memory["replay"]["sketches"].shape == (2, 3, 172)
    for number in range(2):
        assert server.lets_in(START, "b", moved(START, 20 + number))
        server.next_round()
    assert server.lets_in(START, "a", SENT)


def test_the_seed_goes_with_the_memory(server):
    other = Server(seed=None)
    other.memory = server.memory
    assert not other.lets_in(START, "a", SENT)
    assert other.lets_in(START, "a", LATER)
    drawn = [ReplayFilter(SITES).remember({}, [])["replay"]["seed"] for _ in range(2)]
    assert not torch.equal(*drawn)
    most = ReplayFilter(SITES, seed=2**63 - 1)
    assert ReplayFilter(SITES, seed=0)._seed_in(most.remember({}, [])["replay"]) == 2**63 - 1


def replaying():
    """Misbehaviour: the first payload, every round."""
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
    return [FakeDevice(name) for name in names] + [FakeDevice(name, misbehave=replaying()) for name in bad]


def run(folder, devices, *, rounds, state=None, rule=None, seed=1, **settings):
    chosen = strategy(
        aggregation=rule or Exact(rank=3, max_rank=None, seed=0),
        replay=ReplayFilter(FLEET_SITES, seed=seed),
        **settings,
    )
    return run_rounds(
        grid=CohortGrid(devices, perform),
        strategy=chosen,
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
def test_a_run_drops_and_counts_replays(tmp_path, rule):
    lora_xs_bases = bases_of(tmp_path) if isinstance(rule, FedSB) else None
    state = RunState.start(run="run", private=False, adapter=zero_adapter(lora_xs_bases)) if lora_xs_bases else None
    found = run(tmp_path / "runs", fleet(), rounds=4, rule=rule, lora_xs_bases=lora_xs_bases, state=state)
    assert dropped(found) == [{}, *[{"replayed": 1}] * 3]
    assert [done.train.replied for done in found.history[1:]] == [3, 2, 2, 2]


@pytest.mark.usefixtures("_fake_logic")
@pytest.mark.parametrize("rule", [FedSVD(seed=0), RoLoRA(), FedIT()], ids=type)
def test_honest_devices_are_all_let_in(tmp_path, rule):
    assert dropped(run(tmp_path, fleet("abcd", bad=""), rounds=6, rule=rule)) == [{}] * 6


@pytest.mark.usefixtures("_fake_logic")
def test_a_client_alone(tmp_path):
    found = run(tmp_path / "bad", fleet(""), rounds=3)
    assert dropped(found) == [{}, {"replayed": 1}, {"replayed": 1}]
    first = run(tmp_path / "once", fleet(""), rounds=1)
    assert all(torch.equal(found.adapter[site].b, first.adapter[site].b) for site in FLEET_SITES)
    assert dropped(run(tmp_path / "good", fleet("a", bad=""), rounds=5)) == [{}] * 5


@pytest.mark.usefixtures("_fake_logic")
def test_a_run_that_goes_on_still_knows(tmp_path):
    devices = fleet()
    whole = run(tmp_path / "whole", fleet(), rounds=4)
    run(tmp_path / "parts", devices, rounds=2)
    saved = checkpoint.load(tmp_path / "parts", sites=FLEET_SITES)
    resumed = run(tmp_path / "parts", devices, rounds=4, state=saved, seed=None)
    assert dropped(resumed) == dropped(whole) == [{}, *[{"replayed": 1}] * 3]
    assert all(torch.equal(resumed.adapter[site].b, whole.adapter[site].b) for site in FLEET_SITES)
    one, two = (state.memory["replay"] for state in (resumed, whole))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("_fake_logic")
def test_below_the_quorum_what_came_is_known_too(tmp_path):
    assert dropped(run(tmp_path, fleet(), rounds=2, quorum=4)) == [{}, {"replayed": 1}]


@pytest.mark.usefixtures("_fake_logic")
def test_asynchronous_rounds(tmp_path):
    """A quick device sends twice in a round, a slow one what it made of an older adapter."""
    grid, lives = timed_grid(
        tmp_path,
        virtual_device("a", speed=4.0),
        virtual_device("b", speed=0.4),
        virtual_device("x", speed=4.0),
        devices=fleet(),
    )
    chosen, limits = strategy(replay=ReplayFilter(FLEET_SITES, seed=1)), RoundLimits(clock=lives.clock, timeout=1000.0)
    found = run_rounds(
        grid=grid,
        strategy=chosen,
        state=fresh_state(),
        rounds=4,
        checkpoints=tmp_path,
        on_round=lambda _: None,
        limits=limits,
        round_runner=FedBuffRunner(grid, chosen, limits, shift=rebase_product, size=4, concurrency=3),
        min_devices=0,
    )
    assert dropped(found) == [{"replayed": 1}] * 4  # then it is left alone for the round
    assert found.devices["x"].rounds == 1
    assert found.devices["a"].rounds > 4
    assert found.devices["b"].rounds > 0


def test_what_it_does_not_go_with_is_refused():
    with pytest.raises(ValueError, match="put it first"):
        RobustConfig(rules=["norm_bound", "replay"])
    config = compose("aggregation=fedsa 'robust.rules=[replay]'")
    with pytest.raises(AntherError, match=r"robust\.rules: .* aggregation=fedsa every device keeps its own B"):
        replay(config, aggregation(config), FLEET_SITES, seed=1)
    with pytest.raises(ValueError, match="no device sends one"):
        strategy(aggregation=FedSA(), replay=ReplayFilter(FLEET_SITES))
    config = compose("aggregation=fedit privacy=device 'robust.rules=[replay]'")
    with pytest.raises(AntherError, match="robust rule replay inside the bound: what anybody sent before"):
        build(config, training_plan(config, run="r", base="b"), FLEET_SITES, accept_simulated=True)
    with pytest.raises(ValueError, match="under 1"):
        ReplayFilter(FLEET_SITES, near=1.0)


def test_it_is_built_where_it_is_named_and_judges_no_round():
    config = compose("aggregation=exact 'robust.rules=[replay]'")
    rule = aggregation(config)
    assert isinstance(rule, Exact)
    assert isinstance(replay(config, rule, FLEET_SITES, seed=1), ReplayFilter)
    assert replay(compose("aggregation=exact"), rule, FLEET_SITES, seed=1) is None
