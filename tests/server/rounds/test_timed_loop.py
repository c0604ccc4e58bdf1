"""Rounds on a virtual clock: runs continue whatever devices do, and the same seed gives the same run."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import count

import pytest
import torch

from common.errors import AntherError
from models.lora.adapter import adapter_shapes, to_tensors
from privacy.storage import FileStorage
from protocol import messages, quantization
from protocol.tensor_codec import encode
from server.ledger import ServerLedger
from server.rounds import checkpoint
from server.rounds.fedbuff import FedBuffRunner
from server.rounds.loop import run_rounds
from server.rounds.sync import RoundLimits
from simulations.fleet.availability import DailySchedule
from strategies.aggregation import exact
from strategies.aggregation.fedit import FedIT
from strategies.factory.full_plan import training_plan
from strategies.factory.strategy import build
from strategies.fedbuff import PLANS_PER_ROUND
from strategies.phases.training import TrainingPhase
from strategies.selection.everyone import Everyone
from strategies.selection.poisson import Poisson
from strategies.selection.sample import Sample
from strategies.server_optimizers import FedAvgM
from tests.helpers.configs import compose
from tests.helpers.fleet import PLAN, REPORT, SITES, FakeDevice, fresh_state, handle, strategy
from tests.helpers.timed_fleet import RUNTIME, timed_grid, virtual_device

WORK = PLAN.steps * PLAN.batch_size
PRIVATE = replace(
    PLAN,
    privacy=messages.ExamplePrivacy(noise_multiplier=1.0, clip=1.0, sampling_rate=0.5, draws=1, delta=1e-3),
)


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def run(
    folder,
    *fleet,
    rounds=2,
    state=None,
    federated=None,
    target_replies=None,
    timeout=100.0,
    size=None,
    concurrency=3,
    order_seed=0,
    **more,
):
    """Run some rounds, and return the state and the fleet; asynchronous with `size`, the updates per round."""
    grid, virtual_fleet = timed_grid(folder, *fleet, **more)
    if state and state.history:
        virtual_fleet.resume(state.round)
    federated = federated or strategy()
    limits = RoundLimits(clock=virtual_fleet.clock, timeout=timeout, target_replies=target_replies, seed=order_seed)
    round_runner = size and FedBuffRunner(grid, federated, limits, size=size, concurrency=concurrency)
    final = run_rounds(
        grid=grid,
        strategy=federated,
        state=state or fresh_state(),
        rounds=rounds,
        checkpoints=folder / "checkpoints",
        on_round=lambda _: None,
        limits=limits,
        round_runner=round_runner or None,
        min_devices=0,
        before_checkpoint=virtual_fleet.save,
    )
    return final, virtual_fleet


def outcome(state):
    return [replace(done, wall_seconds=0.0) for done in state.history], encode(to_tensors(state.adapter))


def times(virtual_fleet):
    return [round(facts.ended) for facts in virtual_fleet.log.rounds]


def speeds(*values):
    return [virtual_device(name, speed=value) for name, value in zip("abcdefgh", values, strict=False)]


def test_round_ends_with_enough_replies(tmp_path):
    fleet = speeds(8.0, 4.0, 1.0, 0.5)
    waits, virtual_fleet = run(tmp_path / "all", *fleet, timeout=1e6)
    assert [done.train.replied for done in waits.history[1:]] == [4, 4]
    assert times(virtual_fleet) == [0, 16, 32]
    final, virtual_fleet = run(tmp_path / "enough", *speeds(8.0, 4.0, 1.0, 0.5), rounds=5, target_replies=2)
    assert [done.train.replied for done in final.history[1:]] == [2] * 5
    assert final.history[1].train.dropped == {"no reply": 2}
    assert times(virtual_fleet)[1] == 2
    assert sum(done.train.dropped.get("late", 0) for done in final.history[1:]) > 0


def test_names_do_not_order_simultaneous_replies(tmp_path):
    counted = set()
    for seed in range(8):
        final, _ = run(tmp_path / str(seed), *speeds(1.0, 1.0, 1.0, 1.0), rounds=1, target_replies=2, order_seed=seed)
        counted.add(tuple(name for name, facts in sorted(final.devices.items()) if facts.rounds))
    assert len(counted) > 3
    again, _ = run(tmp_path / "again", *speeds(1.0, 1.0, 1.0, 1.0), rounds=1, target_replies=2, order_seed=7)
    assert outcome(again) == outcome(final)


def test_timeout_drops_slow_devices(tmp_path):
    final, virtual_fleet = run(tmp_path, *speeds(8.0, 4.0, 0.1), timeout=10.0)
    assert times(virtual_fleet) == [0, 10, 20]
    assert [done.train.dropped for done in final.history[1:]] == [{"no reply": 1}] * 2
    assert virtual_fleet.log.rounds[2].lost == {}


def test_out_of_memory_device_stops_no_run(tmp_path):
    fleet = [virtual_device(name, memory_mib=RUNTIME + 1) for name in "ab"]
    final, virtual_fleet = run(tmp_path, *fleet)
    assert torch.equal(final.adapter["x"].a, fresh_state().adapter["x"].a)
    assert [facts.lost for facts in virtual_fleet.log.rounds] == [{}, {"killed: memory": 2}, {"killed: memory": 2}]
    assert times(virtual_fleet) == [0, 100, 200]
    for size in (1, 2):
        final, virtual_fleet = run(tmp_path / str(size), *fleet, size=size)
        assert [done.train.replied for done in final.history[1:]] == [0, 0]
        assert times(virtual_fleet)[-1] == 200


def test_round_waits_for_devices_until_timeout(tmp_path):
    offline = [virtual_device("a", availability=DailySchedule([], [0.0, 24.0]))]
    final, virtual_fleet = run(tmp_path / "never", *offline)
    assert [done.train.asked for done in final.history[1:]] == [0, 0]
    assert times(virtual_fleet) == [0, 100, 200]
    later = [virtual_device("a", availability=DailySchedule([1.0, 24.0], [0.0, 24.0]))]
    for size in (None, 1):
        final, virtual_fleet = run(tmp_path / f"later {size}", *later, size=size, timeout=7200.0)
        assert [done.train.replied for done in final.history[1:]] == [1, 1]
        assert 3600 < virtual_fleet.log.rounds[1].ended < 3600 + 700
    empty_sample = strategy(selection=Poisson(rate=0.5, rng=lambda _: _NeverIncluded()))
    final, virtual_fleet = run(tmp_path / "tails", virtual_device("a"), federated=empty_sample)
    assert times(virtual_fleet) == [0, 0, 0]  # that sample isn't drawn again


class _NeverIncluded:
    release = False

    def poisson_batch(self, _size, _rate):
        return torch.arange(0)


def test_adapter_is_kept_below_quorum(tmp_path):
    final, _ = run(tmp_path, *speeds(1.0, 1.0, 0.05), federated=strategy(quorum=3), rounds=1)
    assert torch.equal(final.adapter["x"].a, fresh_state().adapter["x"].a)
    assert (final.history[1].train.replied, final.history[1].train.diagnostics) == (2, {})
    final, _ = run(tmp_path / "met", *speeds(1.0, 1.0, 0.5), federated=strategy(quorum=3), rounds=1)
    assert not torch.equal(final.adapter["x"].a, fresh_state().adapter["x"].a)


@pytest.mark.parametrize("size", [None, 2])
def test_same_seed_gives_same_run(tmp_path, size):
    def once(folder, seed):
        fleet = [
            virtual_device(name, dropout_per_hour=0.999, speed=0.01 * (2 + ord(name) % 3), battery_wh=5.0, charge=4.0)
            for name in "abcdef"
        ]
        federated = strategy(selection=Sample(size=4, seed=3))
        state, virtual_fleet = run(
            tmp_path / folder, *fleet, rounds=4, federated=federated, timeout=3600.0, seed=seed, size=size
        )
        return outcome(state), virtual_fleet.log.rounds

    assert once("first", 1) == once("second", 1)
    assert once("third", 2) != once("fourth", 1)


def test_resumed_run_equals_uninterrupted(tmp_path):
    def fleet():
        return [
            virtual_device(name, speed=0.1, battery_wh=2.0, charge=1.5, throttle_after=60.0, throttled_speed=0.5)
            for name in "abc"
        ]

    whole, virtual_fleet = run(tmp_path / "whole", *fleet(), rounds=4, timeout=1e4)
    run(tmp_path / "parts", *fleet(), rounds=2, timeout=1e4)
    saved = checkpoint.load(tmp_path / "parts" / "checkpoints", sites=SITES)
    resumed, again = run(tmp_path / "parts", *fleet(), rounds=4, state=saved, timeout=1e4)
    assert outcome(resumed) == outcome(whole)
    assert again.log.rounds == virtual_fleet.log.rounds


def test_fedbuff_does_not_wait_for_slow_devices(tmp_path):
    final, virtual_fleet = run(tmp_path, *speeds(4.0, 4.0, 0.4), rounds=6, size=2, timeout=1000.0)
    assert [done.train.replied for done in final.history[1:]] == [2] * 6
    assert times(virtual_fleet)[-1] < 20  # waiting for all would take 120
    rounds = {name: facts.rounds for name, facts in final.devices.items()}
    assert sum(rounds.values()) == 12
    assert rounds["a"] > rounds.get("c", 0)
    run(tmp_path / "again", *speeds(4.0, 4.0, 0.4), rounds=3, size=2)
    saved = checkpoint.load(tmp_path / "again" / "checkpoints", sites=SITES)
    resumed, _ = run(tmp_path / "again", *speeds(4.0, 4.0, 0.4), rounds=6, size=2, state=saved)
    assert [done.train.replied for done in resumed.history[1:]] == [2] * 6


def test_declining_device_is_not_asked_again(tmp_path):
    def fail(_reply):
        raise RuntimeError

    devices = [FakeDevice("a"), FakeDevice("b", misbehave=fail)]
    final, _ = run(tmp_path, *speeds(1.0, 8.0), devices=devices, size=3, timeout=1000.0)
    assert [done.train.dropped for done in final.history[1:]] == [{"failed": 1}] * 2
    assert [done.train.replied for done in final.history[1:]] == [3, 3]


def test_plan_numbers_are_unique(tmp_path, monkeypatch):
    federated, numbers = strategy(aggregation=FedIT()), []
    accept = TrainingPhase.accept

    def record(self, begin, asked, *args, **kwargs):
        numbers.extend((report.device, plan.round) for report, plan in asked.plans.values())
        return accept(self, begin, asked, *args, **kwargs)

    monkeypatch.setattr(TrainingPhase, "accept", record)
    grid, virtual_fleet = timed_grid(tmp_path, *speeds(1.0, 0.3))
    limits = RoundLimits(clock=virtual_fleet.clock, timeout=1000.0)
    round_runner = FedBuffRunner(grid, federated, limits, size=4, concurrency=2)
    run_rounds(
        grid=grid,
        strategy=federated,
        state=fresh_state(),
        rounds=3,
        checkpoints=tmp_path,
        on_round=lambda _: None,
        limits=limits,
        round_runner=round_runner,
        min_devices=0,
    )
    assert len(set(numbers)) == len(numbers) == 12
    of_a = [number for name, number in numbers if name == "a"]
    assert of_a == sorted(of_a)
    assert (
        max(sum(number // PLANS_PER_ROUND == version for number in of_a) for version in (1, 2, 3)) > 1
    )  # twice in a round


def test_private_stale_updates_are_aggregated(tmp_path):
    federated, fresh = strategy(plan=PRIVATE, accept_simulated=True), fresh_state(private=True)
    fleet = speeds(1.0, 1.0, 1.0, 0.3)
    final, _ = run(tmp_path, *fleet, rounds=4, size=3, federated=federated, state=fresh, timeout=1000.0)
    diagnostics = [done.train.diagnostics for done in final.history[1:]]
    assert [done.train.replied for done in final.history[1:]] == [3] * 4
    assert "snr" in diagnostics[0]
    assert any("snr" not in each for each in diagnostics)


def test_private_devices_are_asked_once_per_round(tmp_path):
    """They have paid for a fixed number of rounds; other devices may be asked again."""

    def asked(folder, **changes):
        federated, fresh = strategy(**changes), fresh_state(private="plan" in changes)
        final, virtual_fleet = run(
            folder, *speeds(8.0, 2.0, 0.5), rounds=4, size=5, federated=federated, state=fresh, timeout=1e4
        )
        return {name: facts.asked for name, facts in final.devices.items()}, times(virtual_fleet)[-1]

    assert asked(tmp_path / "open")[0]["a"] > 4
    of_each, seconds = asked(tmp_path / "private", plan=PRIVATE, accept_simulated=True)
    assert of_each == {"a": 4, "b": 4, "c": 4}
    assert seconds < 4 * 40  # four rounds of the slowest device, whose passes are padded to a public size


def test_round_ends_if_all_decline(tmp_path):
    def fail(_reply):
        raise RuntimeError

    devices = [FakeDevice(name, misbehave=fail) for name in "ab"]
    final, virtual_fleet = run(tmp_path, *speeds(8.0, 8.0), devices=devices, size=2, timeout=1000.0)
    assert [done.train.dropped for done in final.history[1:]] == [{"failed": 2}] * 2
    assert times(virtual_fleet)[-1] < 10


@pytest.mark.integration
@pytest.mark.parametrize(("size", "rounds"), [(None, 25), (3, 60)])
def test_late_replies_are_counted_for_ten_rounds(tmp_path, monkeypatch, size, rounds):
    grids, make_grid = [], timed_grid

    def record_grid(*args, **kwargs):
        grids.append(make_grid(*args, **kwargs))
        return grids[-1]

    monkeypatch.setattr(f"{__name__}.timed_grid", record_grid)
    final, _ = run(tmp_path / "late", *speeds(8.0, 8.0, 0.6), rounds=rounds, timeout=10.0, size=size)
    assert sum(done.train.dropped.get("late", 0) for done in final.history[1:]) > 0
    run(tmp_path / "never", *speeds(8.0, 8.0, 0.01), rounds=rounds, timeout=10.0, size=size)
    for _ in range(99):
        grids[1][1].clock.wait(1e9)
    assert len(grids[1][0]._replies) <= 10


class _RecordingSelection(Everyone):
    """Selects every device, and records round and draw of each selection."""

    def __init__(self):
        self.seen = []

    def select(self, devices, *, draw):
        self.seen.append((devices.round, draw))
        return super().select(devices, draw=draw)


def test_selection_gets_round_and_own_draw(tmp_path):
    """Learning rates also decay by round."""
    watched, rates = _RecordingSelection(), {}

    def record(rate, round):
        return rates.setdefault(round, rate / round)

    run(
        tmp_path,
        *speeds(1.0, 0.3),
        rounds=3,
        size=4,
        federated=strategy(selection=watched, lr_schedule=record),
        timeout=1000.0,
    )
    draws = [draw for _, draw in watched.seen]
    assert draws == sorted(draws)
    assert len(set(draws)) > 3
    assert [number for number, _ in watched.seen] == [draw // PLANS_PER_ROUND for draw in draws]
    assert {number for number, _ in watched.seen} == set(rates) == {1, 2, 3}


@pytest.mark.parametrize("optimiser", [None, FedAvgM(lr=1.0, momentum=0.0)])
def test_fedbuff_quantization_loses_nothing(tmp_path, monkeypatch, optimiser):
    """Five rounds add 10⁻³ to numbers of about 1, for which int4 has a resolution of 0.3."""

    def moved(request, device):
        if not isinstance(request, messages.Train):
            return (yield from handle(request, device))
        yield device.name
        held = adapter_shapes(SITES, request.rounded.rank)
        tensors = quantization.decode(request.adapter, held, request.rounded.precision)
        plan, after = request.plan, {name: tensor + 1e-3 for name, tensor in tensors.items()}
        return messages.Update(
            device=device.name,
            run=plan.run,
            round=plan.round,
            rank=plan.rank,
            adapter=encode(after),
            release=False,
            seconds=1.0,
            joules=1.0,
            quality="estimate",
            loss=0.5,
            epsilon=None,
            events=3,
        )

    monkeypatch.setattr("simulations.grid.cohort.handle", moved)
    federated = strategy(aggregation=FedIT(), download="int4", server_optimizer=optimiser)
    final, _ = run(tmp_path, *speeds(1.0, 1.0, 1.0), rounds=5, federated=federated, size=3, timeout=1000.0)
    assert [done.train.replied for done in final.history[1:]] == [3] * 5
    before = to_tensors(fresh_state().adapter)
    changes = torch.cat([(tensor - before[name]).ravel() for name, tensor in to_tensors(final.adapter).items()])
    assert float(changes.max() - changes.min()) < 1e-5  # all equal: updates of older adapters have a lower weight
    assert 3e-3 < float(changes.mean()) < 5.01e-3


def count_updates(monkeypatch):
    """Record the number of updates per device of each closed round."""
    seen, finish = [], TrainingPhase.finish

    def record(self, begin, asked, final, dropped, **kwargs):
        seen.append(Counter(update.device for update in final.updates))
        return finish(self, begin, asked, final, dropped, **kwargs)

    monkeypatch.setattr(TrainingPhase, "finish", record)
    return seen


def test_fast_device_does_not_fill_a_round(tmp_path, monkeypatch):
    """A robust rule tolerates a fifth of the devices being malicious, not four fifths of the updates."""
    seen = count_updates(monkeypatch)
    _, virtual_fleet = run(tmp_path, *speeds(80.0, 1.0, 1.0, 1.0, 1.0), rounds=4, timeout=1e6, size=5, concurrency=5)
    assert [sum(each.values()) for each in seen] == [5] * 4
    assert all(each["a"] <= 1 for each in seen)
    assert times(virtual_fleet)[-1] <= 4 * WORK + 4


@pytest.mark.parametrize(("size", "most"), [(2, 1), (4, 2), (5, 2), (7, 3)])
def test_few_devices_share_a_round(tmp_path, monkeypatch, size, most):
    seen = count_updates(monkeypatch)
    run(tmp_path, *speeds(80.0, 1.0, 0.5), rounds=4, timeout=1e6, size=size, concurrency=3)
    assert [sum(each.values()) for each in seen] == [size] * 4
    assert max(max(each.values()) for each in seen) <= most


def test_remaining_device_fills_the_round(tmp_path, monkeypatch):
    """Two of three fast devices leave, and then the slow ones fail."""

    def fail(_reply):
        raise RuntimeError

    seen = count_updates(monkeypatch)
    hours = [DailySchedule([0.0, end], [0.0, 24.0]) for end in (24.0, 4 / 3600, 4 / 3600)]
    fast = [virtual_device(name, speed=8.0, availability=each) for name, each in zip("abc", hours, strict=True)]
    slow = [virtual_device(name) for name in "def"]
    devices = [*map(FakeDevice, "abc"), *(FakeDevice(name, misbehave=fail) for name in "def")]
    _, virtual_fleet = run(tmp_path, *fast, *slow, devices=devices, rounds=1, timeout=1e4, size=6, concurrency=6)
    assert seen == [{"a": 4, "b": 1, "c": 1}]
    assert times(virtual_fleet)[-1] < 20


@pytest.mark.parametrize("at", [2, 3, 4, 5, 6])
def test_resume_charges_no_extra_plan(tmp_path, monkeypatch, at):
    """σ is calibrated for a number of plans per device, so a repeated request uses the same plan number."""
    asked, sent, accept, calls = (
        defaultdict(set),
        TrainingPhase.request,
        TrainingPhase.accept,
        count(1),
    )

    def record(self, *args, **kwargs):
        final = sent(self, *args, **kwargs)
        for report, plan in final.plans.values():
            asked[report.device].add(plan.round)
        return final

    def killed(self, *args, **kwargs):
        if next(calls) == at:
            raise KeyboardInterrupt
        return accept(self, *args, **kwargs)

    def once(saved):
        federated = strategy(plan=PRIVATE, accept_simulated=True)
        fleet = speeds(8.0, 4.0, 2.0, 1.0, 0.7)
        return run(tmp_path, *fleet, rounds=3, timeout=1e6, size=2, concurrency=3, federated=federated, state=saved)

    monkeypatch.setattr(TrainingPhase, "request", record)
    monkeypatch.setattr(TrainingPhase, "accept", killed)
    with pytest.raises(KeyboardInterrupt):
        once(fresh_state(private=True))
    final, _ = once(checkpoint.load(tmp_path / "checkpoints", sites=SITES))
    assert [done.train.replied for done in final.history[1:]] == [2] * 3
    assert max(map(len, asked.values())) <= 3


@pytest.mark.parametrize("size", [None, 3])
def test_exact_rotates_within_rank_blocks(tmp_path, monkeypatch, size):
    blocks, final = set(), exact.align

    def record(a, b, towards, between):
        blocks.add(tuple(between))
        return final(a, b, towards, between)

    monkeypatch.setattr(exact, "align", record)
    devices = [FakeDevice(n, report=replace(REPORT, device=n, rank=r)) for n, r in zip("abc", (1, 2, 3), strict=True)]
    run(tmp_path, *speeds(4.0, 2.0, 0.5), devices=devices, rounds=4, size=size, timeout=1e4)
    assert {each for block in blocks for each in block} <= {1, 2, 3}


def test_private_round_ends_without_devices(tmp_path, monkeypatch):
    seen = count_updates(monkeypatch)
    federated, fresh = strategy(plan=PRIVATE, accept_simulated=True), fresh_state(private=True)
    _, virtual_fleet = run(
        tmp_path, *speeds(8.0, 4.0, 0.5), rounds=4, size=2, federated=federated, state=fresh, timeout=1e5
    )
    assert all(max(each.values()) == 1 for each in seen)
    assert times(virtual_fleet)[-1] < 1e3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "aggregation=hetlora round_loop=async",
            "round_loop=async: hetlora can't use an update of an older",
        ),
        ("round_loop=async cohort.sampling_rate=0.5", "set cohort.sampling_rate to null"),
        ("aggregation.weighting=rank_slice round_loop=async", "set it to device, or use round_loop=sync"),
        ("aggregation=fedit round_loop=async privacy=device", "timing async can't be charged in advance"),
        (
            "aggregation=fedit privacy=device cohort.size=2 cohort.overselection=1.5",
            "cohort.overselection=1.5: the time of a reply",
        ),
        (
            "round_loop=async cohort.size=2 cohort.overselection=1.5",
            "cohort.overselection=1.5: with round_loop=async",
        ),
        (
            "round_loop=async round_loop.buffer_size=3 round_loop.quorum=4",
            "round_loop.quorum=4: .* than round_loop.buffer_size=3",
        ),
        ("cohort.size=3 cohort.overselection=2 round_loop.quorum=4", "round_loop.quorum=4: .* than cohort.size=3"),
        ("aggregation=fedit privacy=device round_loop.quorum=2", "round_loop.quorum=2: with device-level privacy"),
    ],
)
def test_incompatible_settings_are_refused(tmp_path, overrides, message):
    config, ledger = compose(overrides), ServerLedger(FileStorage(tmp_path))
    with pytest.raises(AntherError, match=message):
        build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=True, ledger=ledger)


def test_overselection():
    config = compose("cohort.size=5 cohort.overselection=1.3")
    final = build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=True)
    assert len(final.cohort.rule.selection.select([str(number) for number in range(20)], draw=1)) == 7
