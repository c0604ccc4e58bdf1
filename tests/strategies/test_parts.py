"""Devices that train a part of the adapter, or some of its sites, through the strategy over the fake fleet."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from models.lora.adapter import Factors, adapter_shapes, from_tensors, init_adapter, select_sites, to_tensors
from models.lora.batched_lora import Layout
from models.lora.trainable import from_trained_tensors, trained_layout, trained_shapes
from privacy.sensitivity import RESOLUTION
from protocol import records, tensor_codec
from protocol.tensor_codec import decode, encode
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsvd import FedSVD
from strategies.aggregation.ffa import FFA
from strategies.aggregation.rolora import RoLoRA
from strategies.central_dp import changes
from strategies.planning.planner import Planner
from strategies.server_optimizers import FedAvgM
from tests.helpers.central import CLIP, EXPECTED, Z, private, simulated
from tests.helpers.fleet import PLAN, SITES, FakeDevice, handle, perform, strategy
from tests.helpers.means import close, dense, true_mean

RANDOM = torch.Generator().manual_seed(0)
START = {name: Factors(a, torch.randn(b.shape, generator=RANDOM)) for name, (a, b) in init_adapter(SITES, 3, 0).items()}
ONE_EACH = {"a": ("x",), "b": ("y",), "c": None, "d": ("x",)}


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


@pytest.fixture
def some_sites(monkeypatch):
    """Plans for the sites that `ONE_EACH` names."""

    whole = Planner.plans

    def plans(self, reports, full, **sent):
        found = whole(self, reports, full, **sent)
        return {name: replace(one, plan=replace(one.plan, sites=ONE_EACH[name])) for name, one in found.items()}

    monkeypatch.setattr(Planner, "plans", plans)


def rounds(federated, devices, count=1):
    """The adapter after each round."""
    arrays, found = records.adapter_to_record(encode(to_tensors(START))), []
    grid = CohortGrid(devices, perform)
    for number in range(1, 1 + count):
        messages = federated.configure_train(number, arrays, ConfigRecord(), grid)
        arrays = federated.aggregate_train(number, grid.send_and_receive(messages))[0] or arrays
        found.append(from_tensors(decode(records.adapter_from_record(arrays), adapter_shapes(SITES, -1))))
    return found


def fleet(names, replies):
    """Devices whose replies are kept by name."""
    return [FakeDevice(name, misbehave=lambda reply, name=name: replies.setdefault(name, reply)) for name in names]


def sent(reply, trains="both", sites=None):
    """The adapter that a reply stands for."""
    start = select_sites(START, sites or SITES)
    expected = trained_shapes({name: SITES[name] for name in start}, 3, trains)
    return from_trained_tensors(decode(reply.adapter, expected), trains, start, None)


@pytest.mark.usefixtures("some_sites")
@pytest.mark.parametrize("rule", [Exact(rank=3, max_rank=None, seed=0), FFA(), FedSVD(seed=0)])
def test_a_site_is_a_matter_of_those_who_trained_it(rule):
    """Through the real loop, who did not train a site does not dilute its mean."""
    replies = {}
    federated = strategy(aggregation=rule)
    (found,) = rounds(federated, fleet("abcd", replies))
    assert federated.trained.replied == 4
    updates = [(sent(replies[name], rule.trains(1), sites), 1.0) for name, sites in ONE_EACH.items()]
    for site in SITES:
        assert close(dense(found, site), true_mean(START, updates, site))
    (alone,) = rounds(strategy(aggregation=rule), fleet("a", {}))
    assert close(dense(alone, "y"), dense(START, "y"))


@pytest.mark.usefixtures("some_sites")
def test_a_reply_holds_the_plans_sites_and_no_other():
    replies = {}
    rounds(strategy(), fleet("abcd", replies))
    whole, x, y = (replies[name].adapter for name in "cab")
    for wrong in (whole, y):
        federated = strategy()
        rounds(federated, [FakeDevice("a", misbehave=lambda reply, wrong=wrong: replace(reply, adapter=wrong))])
        assert federated.trained.dropped == {"codec": 1}
    federated = strategy()
    rounds(federated, [FakeDevice("c", misbehave=lambda reply: replace(reply, adapter=x))])
    assert federated.trained.dropped == {"codec": 1}
    assert len(x) < len(whole)


@pytest.mark.parametrize(
    ("rule", "wanted"), [(RoLoRA(), "bab"), (FFA(), "bbb"), (FedSVD(seed=0), "bbb"), (FedSA(), ["split"] * 3)]
)
def test_a_rule_says_what_is_trained_in_a_round(rule, wanted):
    """What does not travel up stays as it was at the server."""
    asked = []
    federated = strategy(aggregation=rule)
    send = federated._message

    def watch(request, node):
        asked.append(getattr(request, "plan", None))
        return send(request, node)

    federated._message = watch
    found = [START, *rounds(federated, [FakeDevice("a")], count=3)]
    assert [plan.trains for plan in asked if plan] == list(wanted)
    for before, after, trains in zip(found, found[1:], wanted, strict=False):
        for site in SITES:
            if not isinstance(rule, FedSVD):
                assert torch.equal(before[site].a, after[site].a) == (trains == "b")
                assert torch.equal(before[site].b, after[site].b) == (trains != "b")


@pytest.mark.parametrize("update", ["fp32", "int8"])
@pytest.mark.parametrize("rule", [FFA(), FedSA(), RoLoRA()])
def test_half_an_adapter_travels_up(rule, update):
    plan = replace(PLAN, update=update)
    replies, whole = {}, {}
    rounds(strategy(aggregation=rule, plan=plan), fleet("a", replies))
    rounds(strategy(aggregation=FedIT(), plan=plan), fleet("a", whole))
    assert len(replies["a"].adapter) < 0.75 * len(whole["a"].adapter)


def test_the_other_factor_is_refused():
    """A in the place of B, and B with A."""
    for trains in ("a", "both"):
        wrong = encode({name: torch.zeros(shape) for name, shape in trained_shapes(SITES, 3, trains).items()})
        federated = strategy(aggregation=FFA())
        rounds(federated, [FakeDevice("a", misbehave=lambda reply, wrong=wrong: replace(reply, adapter=wrong))])
        assert federated.trained.dropped == {"codec": 1}


def test_feedback_is_for_rules_whose_directions_stay():
    for rule in (RoLoRA(), FedSVD(seed=0)):
        with pytest.raises(ValueError, match="feedback needs directions"):
            strategy(aggregation=rule, plan=replace(PLAN, update="int4", feedback=True))
    strategy(aggregation=FFA(), plan=replace(PLAN, update="int4", feedback=True))


def test_a_site_that_was_not_trained_has_not_changed():
    some = {"x": Factors(START["x"].a + 1.0, START["x"].b)}
    (change,) = changes(Layout(SITES, 3), START, [some])
    stacks = Layout(SITES, 3).stacks(change[None])
    assert torch.allclose(stacks["x"].a, torch.ones((), dtype=torch.float64))
    assert not stacks["x"].b.any()
    assert not any(part.any() for part in stacks["y"])


@pytest.mark.usefixtures("some_sites")
@pytest.mark.parametrize("rule", [FedIT(), FFA(), FedSVD(seed=0)])
def test_per_device_some_sites_are_clipped_alone_and_the_divisor_stays(tmp_path, rule):
    """The loop of McMahan et al. over what is trained: a site that a device left out adds 0, and divides."""
    replies, trains = {}, rule.trains(1)
    (found,) = rounds(private(tmp_path, aggregation=rule), fleet("abcd", replies))
    layout = trained_layout(SITES, 3, trains, START)
    total = np.zeros(layout.size)
    for name, sites in ONE_EACH.items():
        own = sent(replies[name], trains, sites)
        change = (layout.pack(own).double() - layout.pack(select_sites(START, own)).double()).numpy()
        total += change * min(1.0, CLIP / np.linalg.norm(change))
    noise = simulated("updates", 1).rounded_gaussian(total.size, Z * RESOLUTION).numpy() * (CLIP / RESOLUTION)
    row = layout.pack(START).double().numpy() + (total + noise) / EXPECTED
    wanted = layout.unpack(torch.from_numpy(row).float(), START)
    for site in SITES:
        assert close(dense(found, site), dense(wanted, site))


def test_the_longest_reply_is_that_of_the_plan():
    checks = strategy()._checks
    sizes = [
        checks.largest(replace(PLAN, sites=sites, trains=trains)) for sites, trains in ((None, "both"), (("x",), "b"))
    ]
    whole, part = (
        tensor_codec.max_payload(trained_shapes(sites, 3, t))
        for sites, t in ((SITES, "both"), ({"x": SITES["x"]}, "b"))
    )
    assert sizes == [whole, part]


@pytest.mark.parametrize("rule", [FFA(), FedSA(), RoLoRA()], ids=lambda rule: type(rule).__name__)
def test_an_optimiser_steps_along_what_was_trained(rule):
    """Half of the way in each of two rounds; of what nobody trained there is no moment."""
    devices = [FakeDevice("a"), FakeDevice("b")]
    (whole,) = rounds(strategy(aggregation=rule), devices)
    stepping = strategy(aggregation=rule, optimiser=FedAvgM(rate=0.5, momentum=0.0))
    half, then = rounds(stepping, devices, count=2)
    for site, (a, b) in START.items():
        for found, start, wanted in zip(half[site], (a, b), whole[site], strict=True):
            assert torch.allclose(found, (start + wanted) / 2, atol=1e-6)
    trained = {rule.trains(number) for number in (1, 2)}
    named = {"b": {"lora_B"}, "split": {"lora_A"}, "a": {"lora_A"}}
    assert {name.rpartition(".")[2] for name in stepping.memory["mean"]} == set().union(*map(named.get, trained))
    assert not same_adapter(half, then)


def same_adapter(one, other):
    return all(torch.equal(a, b) for site in one for a, b in zip(one[site], other[site], strict=True))
