"""Device-level privacy with the fake fleet: releases, charges, and refused combinations."""

import os
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from common.errors import AntherError
from models.lora.adapter import Factors, adapter_shapes, from_tensors, init_adapter, rank, to_tensors
from models.lora.batched_lora import Layout
from models.lora.lora_xs import zero_adapter
from models.lora.trainable import trained_layout
from privacy.accounting import DEVICE, PoissonGaussian, epsilon
from privacy.bounded_sum import RESOLUTION
from privacy.central import AdaptiveClip, GaussianMechanism
from privacy.noise import SecureNoise
from privacy.noised_gain import STEPS_PER_CLIP
from protocol import records
from protocol.messages import ExamplePrivacy
from protocol.tensor_codec import decode, encode
from simulations.grid.cohort import CohortGrid
from strategies.aggregation import Aggregated
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedsb import FedSB
from strategies.central_dp import BudgetExhausted, changes
from strategies.round.private_evaluation import CentralDPEvaluation, EvaluationPolicy
from strategies.round.request import RoundStart
from strategies.selection.sample import Sample
from strategies.server_optimizers import FedAvgM
from tests.helpers.central import BUDGET, CLIP, EXPECTED, Z, central_dp, poisson, private, simulated
from tests.helpers.fleet import PLAN, SITES, FakeDevice, handle, perform, strategy

START = init_adapter(SITES, 3, seed=0)
DP_SGD = ExamplePrivacy(noise_multiplier=1.0, clip=1.0, sampling_rate=0.5, draws=1, delta=1e-3)


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def start():
    return records.adapter_to_record(encode(to_tensors(START)))


def train(federated, devices, *, server_round=1):
    grid = CohortGrid(devices, perform)
    messages = federated.configure_train(server_round, start(), ConfigRecord(), grid)
    arrays, _ = federated.aggregate_train(server_round, grid.send_and_receive(messages))
    return (
        None if arrays is None else from_tensors(decode(records.adapter_from_record(arrays), adapter_shapes(SITES, -1)))
    )


def flat(adapter):
    """Flatten to `[D]`, site by site, A before B: the order in which noise is added."""
    return np.concatenate([part.double().numpy().ravel() for site in SITES for part in adapter[site]])


def trained(device):
    """Return the factors that a fake device sends in round 1."""
    sent = {}

    def record(reply):
        if hasattr(reply, "adapter"):
            sent["adapter"] = from_tensors(decode(reply.adapter, adapter_shapes(SITES, -1)))
        return reply

    train(strategy(), [replace(device, misbehave=record)])
    return sent["adapter"]


def raises(_reply):
    raise RuntimeError("battery empty")


def moved(factor):
    """Make a misbehavior that sends the adapter moved by a constant."""

    def misbehave(reply):
        return replace(reply, adapter=encode({name: part + factor for name, part in to_tensors(START).items()}))

    return misbehave


def unmoved(reply):
    return replace(reply, adapter=encode(to_tensors(START)))


def expected_release(devices):
    """Compute the release by the loop of McMahan et al., with the server's random numbers."""
    total = np.zeros(flat(START).size)
    for device in devices:
        update = flat(trained(device)) - flat(START)
        total += update * min(1.0, CLIP / np.linalg.norm(update))
    noise = simulated("updates", 1).rounded_gaussian(total.size, Z * RESOLUTION).numpy() * (CLIP / RESOLUTION)
    return flat(START) + (total + noise) / EXPECTED


def test_release_matches_a_reference_loop(tmp_path):
    devices = [FakeDevice("a"), FakeDevice("b")]
    released = train(private(tmp_path), devices)
    assert flat(released) == pytest.approx(expected_release(devices), abs=1e-6)


def test_dropouts_contribute_zero_and_the_divisor_stays(tmp_path):
    dropouts = [FakeDevice("c", misbehave=raises), FakeDevice("d", misbehave=moved(float("nan")))]
    devices = [FakeDevice("a"), FakeDevice("b")]
    federated = private(tmp_path)
    assert flat(train(federated, [*devices, *dropouts])) == pytest.approx(expected_release(devices), abs=1e-6)
    assert federated.trained.dropped == {"codec": 1, "failed": 1}


def test_round_without_updates_is_noised_and_released(tmp_path):
    federated = private(tmp_path)
    released = train(federated, [FakeDevice("a", misbehave=raises)])
    assert flat(released) == pytest.approx(expected_release([]), abs=1e-6)
    assert federated.trained.replied == 0
    assert train(private(tmp_path), []) is not None


def test_zero_update_contributes_zero(tmp_path):
    released = train(private(tmp_path), [FakeDevice("a", misbehave=unmoved)])
    assert flat(released) == pytest.approx(expected_release([]), abs=1e-6)


def test_one_device_moves_the_release_by_at_most_the_clip(tmp_path):
    """A device sends far more than the clip, in addition to two others; the noise is the same."""
    others = [FakeDevice("b"), FakeDevice("c")]
    without = train(private(tmp_path / "1"), others)
    with_device = train(private(tmp_path / "2"), [*others, FakeDevice("a", misbehave=moved(1.0))])
    distance = np.linalg.norm(flat(with_device) - flat(without))
    assert distance <= CLIP / EXPECTED * (1 + 1e-5)  # the adapter is float32
    assert distance == pytest.approx(CLIP / EXPECTED, rel=1e-4)


def test_speed_gives_no_weight(tmp_path):
    slow = FakeDevice("b")
    slow.report = replace(slow.report, examples_per_second=1e-3)
    one = train(private(tmp_path / "1"), [FakeDevice("a"), slow])
    two = train(private(tmp_path / "2"), [FakeDevice("a"), FakeDevice("b")])
    assert flat(one) == pytest.approx(flat(two))


def test_lower_rank_contributes_zeros():
    lower = {site: Factors(f.a[:2] + 1.0, f.b[:, :2]) for site, f in START.items()}
    (change,) = changes(Layout(SITES, 3), START, [lower])
    stacks = Layout(SITES, 3).stacks(change[None])
    for stack in stacks.values():
        assert torch.allclose(stack.a[0, :2], torch.ones(1, dtype=torch.float64))
        assert not stack.a[0, 2:].any()
        assert not stack.b.any()


def test_secure_noise_is_not_reproducible(tmp_path):
    released = []
    for name in "12":
        federated = private(tmp_path / name, level={"noise": lambda _: SecureNoise()})
        released.append(flat(train(federated, [FakeDevice("a", misbehave=unmoved)])) - flat(START))
        assert federated.trained.central.release
        assert federated.central_dp.ledger.charges()[0].release
    assert not np.array_equal(*released)
    assert np.std(released) == pytest.approx(Z * CLIP / EXPECTED, rel=0.3)
    federated = private(tmp_path / "3")
    train(federated, [FakeDevice("a")])
    assert not federated.trained.central.release
    assert not federated.central_dp.ledger.charges()[0].release


def test_charge_is_stored_before_a_message_is_sent(tmp_path):
    federated, grid = private(tmp_path), CohortGrid([FakeDevice("a"), FakeDevice("b")], perform)
    assert federated.central_dp.ledger.charges() == []
    federated.configure_train(1, start(), ConfigRecord(), grid)
    (charge,) = central_dp(tmp_path).ledger.charges()  # as read by another process
    assert (charge.round, charge.asked, charge.clip, charge.expected) == (1, ("a", "b"), CLIP, EXPECTED)
    assert (charge.mechanism.noise_multiplier, charge.mechanism.sampling_rate) == (Z, 1.0)


def test_disk_space_is_reserved_before_charging(tmp_path):
    """Simulate a full disk by a limit on file sizes."""
    each = 4 * sum(part.numel() for factors in START.values() for part in factors)
    devices = [FakeDevice("a"), FakeDevice("b")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * each, limits[1]))  # a few bytes too few
    try:
        with pytest.raises(AntherError, match="the updates of a round may need 1 MiB; free disk space, or set TMPDIR"):
            train(private(tmp_path), devices)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert central_dp(tmp_path).ledger.charges() == []
    federated = private(tmp_path)
    messages = federated.configure_train(1, start(), ConfigRecord(), grid := CohortGrid(devices, perform))
    file = federated._training[1].updates.adapters._file.fileno()
    assert os.fstat(file).st_size >= 2 * each
    released, _ = federated.aggregate_train(1, grid.send_and_receive(messages))
    assert released is not None
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(file)  # the reserved file was used, and is closed


def test_charged_round_is_released_once(tmp_path):
    federated = private(tmp_path)
    train(federated, [FakeDevice("a")])
    with pytest.raises(ValueError, match="charge_round must be called before a round is released"):
        federated.central_dp.privatize(federated.update.aggregation, START, [], round=1)


def test_devices_at_their_limit_are_not_asked(tmp_path):
    federated = private(tmp_path, level={"budget": replace(BUDGET, participations=2)}, selection=Sample(size=1, seed=0))
    devices, asked = [FakeDevice("a"), FakeDevice("b")], []
    for number in (1, 2, 3, 4):
        train(federated, devices, server_round=number)
        asked += federated.trained.devices
    assert sorted(asked) == ["a", "a", "b", "b"]
    with pytest.raises(BudgetExhausted, match="every device was selected in 2 rounds"):
        train(federated, devices, server_round=5)
    assert len(federated.central_dp.ledger.charges()) == 4


@pytest.mark.integration
def test_secret_sample_charges_every_device(tmp_path):
    budget = replace(BUDGET, participations=None)
    federated = private(tmp_path, level={"budget": budget, "sampling_rate": 0.5}, selection=poisson(0.5))
    devices = [FakeDevice(name) for name in "abcdef"]
    sizes = []
    for number in range(1, 9):
        train(federated, devices, server_round=number)
        sizes.append(federated.trained.asked)
    assert len(set(sizes)) > 1
    charges = federated.central_dp.ledger.charges()
    assert [charge.asked for charge in charges] == [None] * 8
    assert {charge.mechanism.sampling_rate for charge in charges} == {0.5}


def test_sampling_rate_must_match_the_selection(tmp_path):
    for level, selection in (({"sampling_rate": 0.5}, Sample(size=1, seed=0)), ({}, poisson(0.5))):
        with pytest.raises(ValueError, match="accounted with a sampling rate"):
            private(tmp_path, level=level, selection=selection)
    with pytest.raises(ValueError, match="accounted with a sampling rate"):
        private(tmp_path, level={"sampling_rate": 0.4}, selection=poisson(0.5))


def test_nonlinear_rule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not linear in the updates"):
        private(tmp_path, aggregation=Exact(rank=3, max_rank=None, seed=0))


def test_metrics_contain_noised_values_only(tmp_path):
    federated = private(tmp_path)
    train(federated, [FakeDevice("a")])
    metrics = federated.trained
    assert metrics.loss is None  # although the device reported it
    assert metrics.epsilon is None
    (guarantee,) = metrics.guarantees
    assert guarantee == metrics.central.guarantee
    assert (guarantee.unit, guarantee.delta, guarantee.relation) == ("device", 1e-3, "add_or_remove_one")
    assert set(metrics.diagnostics) == {"snr", "clip", "noise"}
    assert metrics.central.deviation == pytest.approx(Z * CLIP / EXPECTED)
    assert federated.private
    assert not federated.evaluation.policy.is_due(1)


def test_oversized_release_is_charged_but_not_used(tmp_path, caplog):
    """Because of the noise, or of the server optimizer's step after it."""
    large_clip, large_step = {"clip": 1e4}, FedAvgM(lr=1e4, momentum=0.9)
    for name, settings in (("noise", {"level": large_clip}), ("step", {"server_optimizer": large_step})):
        federated, devices = private(tmp_path / name, **settings), [FakeDevice("a")]
        assert train(federated, devices) is None
        assert "devices would refuse the next" in caplog.text
        caplog.clear()
        assert federated.memory == {}
        assert federated.trained.central.guarantee == federated.trained.guarantees[0]
        assert federated.central_dp.ledger.participations() == {"a": 1}


def test_evaluation_is_charged_or_left_out(tmp_path, caplog):
    once = PoissonGaussian(noise_multiplier=10.0, sampling_rate=1.0, steps=1)
    training = PoissonGaussian(noise_multiplier=Z, sampling_rate=1.0, steps=1)
    limit = epsilon([training, once], BUDGET.delta, DEVICE).value
    budget = replace(BUDGET, epsilon=limit, other_releases=(once,))
    level = central_dp(tmp_path, budget=budget)
    level.charge_round(1, ["a"], b"adapter")  # planned evaluations are charged already
    assert level.charge_evaluation(1, b"adapter", once, clip=0.1, expected=8.0)
    charge = level.ledger.charges()[-1]
    assert (charge.purpose, charge.asked, charge.clip, charge.expected) == ("measure", None, 0.1, 8.0)
    assert not level.charge_evaluation(1, b"adapter", once, clip=0.1, expected=8.0)  # again, after a restart
    assert "round 1 is not evaluated: round 1 would bring a device to ε=" in caplog.text
    assert len(level.ledger.charges()) == 2
    assert level.ledger.participations() == {"a": 1}


def test_evaluation_is_noised_until_the_budget_is_spent(tmp_path):
    once = PoissonGaussian(noise_multiplier=5.0, sampling_rate=1.0, steps=1)
    training = PoissonGaussian(noise_multiplier=Z, sampling_rate=1.0, steps=1)
    limit = epsilon([training, once], BUDGET.delta, DEVICE).value + 1e-9
    evaluation = CentralDPEvaluation(
        noise_multiplier=5.0, clip=0.2, devices=4, noise=lambda number: simulated("measure", number)
    )
    federated = private(
        tmp_path,
        level={"budget": replace(BUDGET, epsilon=limit, other_releases=(once,))},
        evaluation_policy=EvaluationPolicy(interval=1, central_noise=evaluation),
    )
    devices = [FakeDevice("a"), FakeDevice("b")]
    train(federated, devices)
    grid, results = CohortGrid(devices, perform), []
    for _ in range(2):  # the budget does not cover the second one
        asked = list(federated.configure_evaluate(1, start(), ConfigRecord(), grid))
        federated.aggregate_evaluate(1, grid.send_and_receive(asked))
        results.append((len(asked), federated.validation))
    (asked, first), (none, second) = results
    gains = 2 * min(0.2, 1.0 - 1.0 / 2)  # reported by both fake devices, clipped
    noise = simulated("measure", 1).rounded_gaussian(1, 5.0 * STEPS_PER_CLIP).item() * 0.2 / STEPS_PER_CLIP
    assert (asked, first.gain) == (2, pytest.approx((gains + noise) / 4, abs=1e-3))
    assert (first.base, first.shared, first.devices) == (None, None, {})
    assert (none, second.gain, second.dropped) == (0, None, {})
    assert [charge.purpose for charge in federated.central_dp.ledger.charges()] == ["train", "measure"]


def test_evaluation_without_noise_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no metric is stored without noise"):
        private(tmp_path, evaluation_policy=EvaluationPolicy())


def test_only_cores_are_clipped_and_noised(tmp_path):
    size = 3
    generator = torch.Generator().manual_seed(0)

    def columns(length):
        return torch.linalg.qr(torch.randn(length, size, generator=generator)).Q

    lora_xs_bases = {name: Factors(columns(site.inputs).T, columns(site.outputs)) for name, site in SITES.items()}
    level = central_dp(tmp_path, lora_xs_bases=lora_xs_bases)
    level.charge_round(1, ["a"], b"adapter")
    released, _ = level.privatize(FedSB(), zero_adapter(lora_xs_bases), [], round=1)
    noise = simulated("updates", 1).rounded_gaussian(len(SITES) * size * size, Z * RESOLUTION)
    cores = trained_layout(SITES, size, "cores", lora_xs_bases).pack(released.adapter)
    assert cores.numpy() == pytest.approx((noise * (CLIP / RESOLUTION) / EXPECTED).numpy(), abs=1e-6)
    for name, (a, left) in lora_xs_bases.items():
        assert torch.equal(released.adapter[name].a, a)
        assert torch.allclose(left @ (left.T @ released.adapter[name].b), released.adapter[name].b, atol=1e-6)


def test_both_levels_give_two_guarantees(tmp_path):
    federated = private(tmp_path, plan=replace(PLAN, privacy=DP_SGD))
    train(federated, [FakeDevice("a"), FakeDevice("b")])
    per_image, per_device = federated.trained.guarantees
    assert (per_image.unit, per_image.value, per_device.unit) == ("image", 1.5, "device")
    assert per_device.value == federated.trained.central.guarantee.value


def test_private_updates_have_an_snr():
    federated = strategy(plan=replace(PLAN, privacy=DP_SGD), accept_simulated=True)
    train(federated, [FakeDevice(name) for name in "abcd"])
    assert 0 <= federated.trained.diagnostics["snr"] < 2  # updates of fake devices are noise
    assert "snr" not in train_metrics(strategy(), [FakeDevice(name) for name in "abcd"]).diagnostics


def train_metrics(federated, devices):
    train(federated, devices)
    return federated.trained


def test_adaptive_clip_is_resumed(tmp_path):
    adaptive = AdaptiveClip(quantile=0.5, rate=0.5, noise_stddev=1.0)
    level = {"mechanism": GaussianMechanism(noise_multiplier=Z, expected=EXPECTED, adaptive=adaptive)}
    federated = private(tmp_path, level=level)
    first = train_metrics(federated, [FakeDevice("a")]).central
    assert first.clip == CLIP != first.next_clip
    assert train_metrics(federated, [FakeDevice("a")]).central.clip == first.next_clip
    federated.trained = None  # a new run
    assert train_metrics(federated, [FakeDevice("a")]).central.clip == CLIP
    charged = [charge.clip for charge in federated.central_dp.ledger.charges()]
    assert charged == [CLIP, first.next_clip, CLIP]


def test_rank_of_the_adapter_stays(tmp_path):
    assert rank(train(private(tmp_path), [FakeDevice("a")])) == 3


@pytest.mark.parametrize("scale", [0x3DCD, 0x3F80])  # 0.1 and 1, bfloat16
def test_quantized_changes_are_clipped_after_decoding(tmp_path, scale):
    """Any update, with any residual of earlier rounds, moves the sum by at most C."""

    def largest(reply):
        return replace(reply, adapter=scale.to_bytes(2, "little") * 4 + reply.adapter[8:])

    plan = replace(PLAN, update="int4", feedback=True)
    adapters = []
    for devices in ([], [FakeDevice("a", misbehave=largest)]):
        federated = private(tmp_path / str(len(devices)), plan=plan)
        adapters.append(flat(train(federated, [FakeDevice("b"), *devices])))
        assert federated.trained.dropped == {}
    assert np.linalg.norm(adapters[1] - adapters[0]) * EXPECTED == pytest.approx(CLIP, rel=1e-4)


def test_server_optimizer_uses_the_noised_mean(tmp_path):
    devices = [FakeDevice("a"), FakeDevice("b", misbehave=lambda _: 1 / 0)]
    released = train(private(tmp_path / "mean"), devices)
    stepped = private(tmp_path / "step", server_optimizer=FedAvgM(lr=0.5, momentum=0.9))
    assert flat(train(stepped, devices)) == pytest.approx((flat(START) + flat(released)) / 2, abs=1e-6)
    change = flat(released) - flat(START)
    mean = from_tensors(stepped.memory["mean"])
    assert flat(mean) == pytest.approx(change, abs=1e-6)


def test_server_optimizer_moves_cores_only():
    lora_xs_bases = {
        name: Factors(torch.linalg.qr(torch.randn(site.inputs, 3)).Q.T, torch.linalg.qr(torch.randn(site.outputs, 3)).Q)
        for name, site in SITES.items()
    }
    federated = strategy(
        plan=PLAN, lora_xs_bases=lora_xs_bases, aggregation=FedSB(), server_optimizer=FedAvgM(lr=0.5, momentum=0.0)
    )
    cores = {name: torch.randn(3, 3) for name in SITES}
    moved = {name: Factors(a, left @ cores[name]) for name, (a, left) in lora_xs_bases.items()}
    begin = RoundStart(number=1, adapter=zero_adapter(lora_xs_bases))
    stepped, state = federated.update._take_step(
        begin, begin.adapter, Aggregated(moved, {}), residual={}, format=federated.format
    )
    assert {name: tuple(core.shape) for name, core in state["mean"].items()} == {
        f"{name}.core": (3, 3) for name in SITES
    }
    for name, (a, left) in lora_xs_bases.items():
        assert torch.equal(stepped.adapter[name].a, a)
        assert torch.allclose(stepped.adapter[name].b, left @ (0.5 * cores[name]), atol=1e-6)
