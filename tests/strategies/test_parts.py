"""Training of a part of the adapter or some of its sites, with the fake fleet."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from models.lora.adapter import Factors, adapter_shapes, from_tensors, init_adapter, select_sites, to_tensors
from models.lora.batched_lora import Layout
from models.lora.trainable import from_trained_tensors, trained_layout, trained_shapes
from privacy.bounded_sum import RESOLUTION
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
from strategies.phases.training import TrainingPhase
from strategies.planning.planner import Planner
from strategies.server_optimizers import FedAvgM
from tests.helpers.central import CLIP, EXPECTED, Z, private, simulated
from tests.helpers.fleet import PLAN, SITES, FakeDevice, handle, perform, strategy
from tests.helpers.means import close, dense, true_mean

RANDOM = torch.Generator().manual_seed(0)
START = {name: Factors(a, torch.randn(b.shape, generator=RANDOM)) for name, (a, b) in init_adapter(SITES, 3, 0).items()}
SITES_OF = {"a": ("x",), "b": ("y",), "c": None, "d": ("x",)}


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


@pytest.fixture
def _restricted_plans(monkeypatch):
    """Restrict plans to the sites in `SITES_OF`."""

    original = Planner.plans

    def plans(self, reports, full, **sent):
        result = original(self, reports, full, **sent)
        return {
            name: replace(planned, plan=replace(planned.plan, sites=SITES_OF[name])) for name, planned in result.items()
        }

    monkeypatch.setattr(Planner, "plans", plans)


def rounds(federated, devices, count=1):
    """Run rounds, and return the adapter after each."""
    arrays, result = records.adapter_to_record(encode(to_tensors(START))), []
    grid = CohortGrid(devices, perform)
    for number in range(1, 1 + count):
        messages = federated.configure_train(number, arrays, ConfigRecord(), grid)
        arrays = federated.aggregate_train(number, grid.send_and_receive(messages))[0] or arrays
        result.append(from_tensors(decode(records.adapter_from_record(arrays), adapter_shapes(SITES, -1))))
    return result


def fleet(names, replies):
    """Make devices whose replies are recorded by name."""
    return [FakeDevice(name, misbehave=lambda reply, name=name: replies.setdefault(name, reply)) for name in names]


def sent(reply, trains="both", sites=None):
    """Decode the adapter of a reply."""
    start = select_sites(START, sites or SITES)
    expected = trained_shapes({name: SITES[name] for name in start}, 3, trains)
    return from_trained_tensors(decode(reply.adapter, expected), trains, start, None)


@pytest.mark.usefixtures("_restricted_plans")
@pytest.mark.parametrize("rule", [Exact(rank=3, max_rank=None, seed=0), FFA(), FedSVD(seed=0)])
def test_sites_are_aggregated_over_their_devices(rule):
    """Devices that did not train a site do not dilute its mean."""
    replies = {}
    federated = strategy(aggregation=rule)
    (result,) = rounds(federated, fleet("abcd", replies))
    assert federated.trained.replied == 4
    updates = [(sent(replies[name], rule.trains(1), sites), 1.0) for name, sites in SITES_OF.items()]
    for site in SITES:
        assert close(dense(result, site), true_mean(START, updates, site))
    (single,) = rounds(strategy(aggregation=rule), fleet("a", {}))
    assert close(dense(single, "y"), dense(START, "y"))


@pytest.mark.usefixtures("_restricted_plans")
def test_replies_with_other_sites_are_rejected():
    replies = {}
    rounds(strategy(), fleet("abcd", replies))
    full, x, y = (replies[name].adapter for name in "cab")
    for payload in (full, y):
        federated = strategy()
        rounds(federated, [FakeDevice("a", misbehave=lambda reply, payload=payload: replace(reply, adapter=payload))])
        assert federated.trained.dropped == {"codec": 1}
    federated = strategy()
    rounds(federated, [FakeDevice("c", misbehave=lambda reply: replace(reply, adapter=x))])
    assert federated.trained.dropped == {"codec": 1}
    assert len(x) < len(full)


@pytest.mark.parametrize(
    ("rule", "expected"), [(RoLoRA(), "bab"), (FFA(), "bbb"), (FedSVD(seed=0), "bbb"), (FedSA(), ["split"] * 3)]
)
def test_rule_determines_the_trained_part(monkeypatch, rule, expected):
    """Tensors that are not uploaded stay unchanged on the server."""
    asked, request = [], TrainingPhase.request

    def record(self, *args, **kwargs):
        made = request(self, *args, **kwargs)
        asked.extend(message.plan.trains for message in made.messages.values())
        return made

    monkeypatch.setattr(TrainingPhase, "request", record)
    result = [START, *rounds(strategy(aggregation=rule), [FakeDevice("a")], count=3)]
    assert asked == list(expected)
    for before, after, trains in zip(result, result[1:], expected, strict=False):
        for site in SITES:
            if not isinstance(rule, FedSVD):
                assert torch.equal(before[site].a, after[site].a) == (trains == "b")
                assert torch.equal(before[site].b, after[site].b) == (trains != "b")


@pytest.mark.parametrize("update", ["fp32", "int8"])
@pytest.mark.parametrize("rule", [FFA(), FedSA(), RoLoRA()])
def test_one_factor_halves_the_upload(rule, update):
    plan = replace(PLAN, update=update)
    replies, full = {}, {}
    rounds(strategy(aggregation=rule, plan=plan), fleet("a", replies))
    rounds(strategy(aggregation=FedIT(), plan=plan), fleet("a", full))
    assert len(replies["a"].adapter) < 0.75 * len(full["a"].adapter)


def test_other_factor_is_rejected():
    """Send A instead of B, and A with B."""
    for trains in ("a", "both"):
        payload = encode({name: torch.zeros(shape) for name, shape in trained_shapes(SITES, 3, trains).items()})
        federated = strategy(aggregation=FFA())
        rounds(federated, [FakeDevice("a", misbehave=lambda reply, payload=payload: replace(reply, adapter=payload))])
        assert federated.trained.dropped == {"codec": 1}


def test_feedback_requires_stable_factors():
    for rule in (RoLoRA(), FedSVD(seed=0)):
        with pytest.raises(ValueError, match="feedback: the residual can't be used in a later round"):
            strategy(aggregation=rule, plan=replace(PLAN, update="int4", feedback=True))
    strategy(aggregation=FFA(), plan=replace(PLAN, update="int4", feedback=True))


def test_untrained_site_has_zero_change():
    some = {"x": Factors(START["x"].a + 1.0, START["x"].b)}
    (change,) = changes(Layout(SITES, 3), START, [some])
    stacks = Layout(SITES, 3).stacks(change[None])
    assert torch.allclose(stacks["x"].a, torch.ones((), dtype=torch.float64))
    assert not stacks["x"].b.any()
    assert not any(part.any() for part in stacks["y"])


@pytest.mark.usefixtures("_restricted_plans")
@pytest.mark.parametrize("rule", [FedIT(), FFA(), FedSVD(seed=0)])
def test_central_dp_with_some_sites(tmp_path, rule):
    """Compare with the loop of McMahan et al.: an untrained site adds 0 and does not change the divisor."""
    replies, trains = {}, rule.trains(1)
    (result,) = rounds(private(tmp_path, aggregation=rule), fleet("abcd", replies))
    layout = trained_layout(SITES, 3, trains, START)
    total = np.zeros(layout.size)
    for name, sites in SITES_OF.items():
        update = sent(replies[name], trains, sites)
        change = (layout.pack(update).double() - layout.pack(select_sites(START, update)).double()).numpy()
        total += change * min(1.0, CLIP / np.linalg.norm(change))
    noise = simulated("updates", 1).rounded_gaussian(total.size, Z * RESOLUTION).numpy() * (CLIP / RESOLUTION)
    row = layout.pack(START).double().numpy() + (total + noise) / EXPECTED
    expected = layout.unpack(torch.from_numpy(row).float(), START)
    for site in SITES:
        assert close(dense(result, site), dense(expected, site))


def test_max_payload_depends_on_the_plan():
    validator = strategy().training.validator
    sizes = [
        validator.max_payload(replace(PLAN, sites=sites, trains=trains))
        for sites, trains in ((None, "both"), (("x",), "b"))
    ]
    full, part = (
        tensor_codec.max_payload(trained_shapes(sites, 3, t))
        for sites, t in ((SITES, "both"), ({"x": SITES["x"]}, "b"))
    )
    assert sizes == [full, part]


@pytest.mark.parametrize("rule", [FFA(), FedSA(), RoLoRA()], ids=lambda rule: type(rule).__name__)
def test_server_optimizer_moves_the_trained_part(rule):
    """Half a step in each of two rounds; untrained tensors have no moment."""
    devices = [FakeDevice("a"), FakeDevice("b")]
    (full,) = rounds(strategy(aggregation=rule), devices)
    stepping = strategy(aggregation=rule, server_optimizer=FedAvgM(lr=0.5, momentum=0.0))
    half, after = rounds(stepping, devices, count=2)
    for site, (a, b) in START.items():
        for result, start, expected in zip(half[site], (a, b), full[site], strict=True):
            assert torch.allclose(result, (start + expected) / 2, atol=1e-6)
    trained = {rule.trains(number) for number in (1, 2)}
    tensors_of = {"b": {"lora_B"}, "split": {"lora_A"}, "a": {"lora_A"}}
    assert {name.rpartition(".")[2] for name in stepping.memory["mean"]} == set().union(*map(tensors_of.get, trained))
    assert not same_adapter(half, after)


def same_adapter(first, second):
    return all(torch.equal(a, b) for site in first for a, b in zip(first[site], second[site], strict=True))
