"""The round loop: resuming, waiting for devices, and failed rounds."""

from dataclasses import replace

import pytest
import torch

from common.errors import AntherError
from models.lora.adapter import to_tensors
from protocol import records
from protocol.messages import Evaluation, EvaluationPrivacy, ExamplePrivacy, Personalize, Update
from protocol.tensor_codec import encode
from server.rounds import checkpoint
from server.rounds.federation import federate
from server.rounds.loop import personalize, run_rounds
from server.rounds.sync import RoundLimits
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.fedit import FedIT
from strategies.round.private_evaluation import EvaluationPolicy
from strategies.selection import Sampling
from strategies.selection.sample import Sample
from tests.helpers.configs import compose
from tests.helpers.fleet import PLAN, REPORT, SITES, FakeDevice, fresh_state, handle, perform, strategy


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def run(folder, *, state=None, rounds=4, on_round=lambda _: None, devices="abcde", **settings):
    grid = CohortGrid([FakeDevice(name) for name in devices], perform)
    return run_rounds(
        grid=grid,
        strategy=strategy(selection=Sample(size=2, seed=3)),
        state=state or fresh_state(),
        rounds=rounds,
        checkpoints=folder,
        on_round=on_round,
        **settings,
    )


def outcome(state):
    """Return everything except durations."""
    return [replace(done, wall_seconds=0.0) for done in state.history], state.best_round


def test_round_zero_and_one_per_round(tmp_path):
    rounds_seen = []
    state = run(tmp_path, rounds=2, on_round=rounds_seen.append)
    assert [done.number for done in rounds_seen] == [0, 1, 2]
    assert tuple(rounds_seen) == state.history
    assert rounds_seen[0].train is None
    assert rounds_seen[0].validation.shared is None  # an untrained adapter equals the base
    assert rounds_seen[2].train.asked == 2
    assert rounds_seen[2].validation.shared == pytest.approx(1 / 3)
    assert rounds_seen[2].train.devices == rounds_seen[2].validation.devices == {}  # the state has sums
    assert sum(facts.steps for facts in state.devices.values()) == 2 * 2 * PLAN.steps
    assert state.best_round == 2


@pytest.mark.parametrize("dies_after", [0, 1, 3])
def test_resumed_run_equals_uninterrupted(tmp_path, dies_after):
    whole = run(tmp_path / "whole")

    class _Killed(BaseException):
        pass

    def die(round):
        if round.number == dies_after:
            raise _Killed

    with pytest.raises(_Killed):
        run(tmp_path / "parts", on_round=die)
    resumed = run(tmp_path / "parts", state=checkpoint.load(tmp_path / "parts", sites=SITES))
    assert outcome(resumed) == outcome(whole)
    assert encode(to_tensors(resumed.adapter)) == encode(to_tensors(whole.adapter))
    assert encode(to_tensors(resumed.best_adapter)) == encode(to_tensors(whole.best_adapter))


def test_resume_remembers_ledger_lengths(tmp_path):
    def ask(rounds, state):
        grid, lengths = CohortGrid([FakeDevice(name) for name in "ab"], perform), []

        def record(messages, **_timeout):
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == "train":
                    lengths.append(records.request_from_records("train", message.content).echo)
            return CohortGrid.send_and_receive(grid, messages)

        grid.send_and_receive = record
        run_rounds(
            grid=grid, strategy=strategy(), state=state, rounds=rounds, checkpoints=tmp_path, on_round=lambda _: None
        )
        return lengths

    assert ask(2, fresh_state()) == [0, 0, 3, 3]
    assert ask(3, checkpoint.load(tmp_path, sites=SITES)) == [3, 3]


def test_complete_run_is_unchanged(tmp_path):
    state = run(tmp_path, rounds=1)
    assert run(tmp_path, state=state, rounds=1) is state


def test_no_reply_keeps_the_adapter(tmp_path):
    def fail(reply):
        if hasattr(reply, "adapter"):
            raise RuntimeError
        return reply

    grid = CohortGrid([FakeDevice("a", misbehave=fail)], perform)
    state = run_rounds(
        grid=grid, strategy=strategy(), state=fresh_state(), rounds=2, checkpoints=tmp_path, on_round=lambda _: None
    )
    assert torch.equal(state.adapter["x"].a, fresh_state().adapter["x"].a)
    assert state.history[2].train.dropped == {"failed": 1}


def test_too_few_devices(tmp_path):
    with pytest.raises(AntherError, match="1 of 3 devices are connected after 0 s"):
        run(tmp_path, devices="a", min_devices=3, limits=RoundLimits(timeout=0.0))


class _LeavingGrid(CohortGrid):
    """Lists the given numbers of nodes in turn, then the last number."""

    def __init__(self, devices, counts):
        super().__init__(devices, perform)
        self.counts = counts

    def get_node_ids(self):
        now = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        return sorted(super().get_node_ids())[:now]


class _MinuteClock:
    """Clock on which every wait takes a minute."""

    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time

    def wait(self, _until):
        self.time += 60.0


def leave_after_first_round(folder, counts, **settings):
    """Run four devices; some leave after the first round."""
    grid = _LeavingGrid([FakeDevice(name) for name in "abcd"], [4])

    def on_round(done):
        grid.counts = counts if done.number else grid.counts

    options = {"min_devices": 4, "limits": RoundLimits(timeout=0.0)} | settings
    return run_rounds(
        grid=grid, strategy=strategy(), state=fresh_state(), rounds=3, checkpoints=folder, on_round=on_round, **options
    )


def test_run_survives_leaving_devices(tmp_path):
    """All devices must be connected before the first round; later rounds use the connected ones."""
    state = leave_after_first_round(tmp_path, [3])
    assert [done.train.replied for done in state.history[1:]] == [4, 3, 3]


def test_no_devices_waits_or_raises(tmp_path, caplog):
    with pytest.raises(AntherError, match="0 of 1 devices are connected after 0 s"):
        leave_after_first_round(tmp_path / "dead", [0])
    clock = _MinuteClock()
    counts_by_minute = [0] * 130 + [2]  # number of nodes, minute by minute
    state = leave_after_first_round(
        tmp_path / "night", counts_by_minute, wait_forever=True, limits=RoundLimits(timeout=3600.0, clock=clock)
    )
    assert [done.train.replied for done in state.history[1:]] == [4, 2, 2]
    lines = [line for line in caplog.messages if line.startswith("0 of 1 devices are connected; waiting for 1 more")]
    assert len(lines) == 3  # immediately, and every hour


def failing(times, reason=RuntimeError):
    """Make the first updates of a device fail."""
    remaining = [times]

    def fail(reply):
        if isinstance(reply, Update) and remaining[0] > 0:
            remaining[0] -= 1
            raise reason
        return reply

    return fail


def run_with_retries(folder, *devices, clock=None, **settings):
    rounds_seen, clock = [], clock or _MinuteClock()
    state = run_rounds(
        grid=CohortGrid(list(devices), perform),
        strategy=strategy(),
        state=fresh_state(),
        rounds=2,
        checkpoints=folder,
        on_round=rounds_seen.append,
        wait_forever=True,
        limits=RoundLimits(timeout=60.0, clock=clock),
        **settings,
    )
    return state, [done.number for done in rounds_seen]


def test_round_without_reply_is_retried(tmp_path, caplog):
    device = FakeDevice("a", misbehave=failing(3))
    state, rounds_seen = run_with_retries(tmp_path, device)
    assert rounds_seen == [0, 1, 2]
    assert [done.train.replied for done in state.history[1:]] == [1, 1]
    assert device.requests.count("Train") == 5
    assert device.requests.count("Evaluate") == 2  # an untrained adapter isn't evaluated
    lines = [line for line in caplog.messages if "it doesn't count" in line]
    assert lines[0] == "round 1: 0 accepted replies of 1 (1 failed), 1 needed: it doesn't count; retrying in 30 s"
    assert [line.rsplit(" ", 2)[1] for line in lines] == ["30", "60", "120"]
    assert torch.isfinite(state.adapter["x"].a).all()


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -1.0, 1e300])
def test_invalid_losses_are_rejected(tmp_path, loss):
    """In training and in evaluation; the checkpoint, which is JSON, is still written."""

    def wrong(reply):
        if isinstance(reply, Update):
            return replace(reply, loss=loss)
        return replace(reply, base=loss, shared=loss) if isinstance(reply, Evaluation) else reply

    grid = CohortGrid([FakeDevice("a", misbehave=wrong), FakeDevice("b")], perform)
    run_rounds(
        grid=grid, strategy=strategy(), state=fresh_state(), rounds=2, checkpoints=tmp_path, on_round=lambda _: None
    )
    state = checkpoint.load(tmp_path, sites=SITES)
    assert [done.train.replied for done in state.history[1:]] == [1, 1]
    assert all(sum(done.validation.dropped.values()) == 1 for done in state.history[1:])
    assert state.history[2].validation.shared == pytest.approx(1 / 3)


def test_patience_stops_an_unfinished_run(tmp_path):
    device = FakeDevice("a", misbehave=failing(10**6))
    with pytest.raises(
        AntherError, match=r"round 1 had fewer than 1 accepted replies in \d+ tries over 2 hours \(\d+ failed\)"
    ):
        run_with_retries(tmp_path, device, patience=2.0)
    assert checkpoint.load(tmp_path, sites=SITES).round == 0
    resumed = run_rounds(
        grid=CohortGrid([FakeDevice("a")], perform),
        strategy=strategy(),
        state=checkpoint.load(tmp_path, sites=SITES),
        rounds=2,
        checkpoints=tmp_path,
        on_round=lambda _: None,
    )
    assert resumed.round == 2


def test_device_without_pictures_is_not_counted(tmp_path):
    empty = FakeDevice("a", report=replace(REPORT, device="a", pictures=False))
    with pytest.raises(AntherError, match="1 of 2 devices are connected"):
        run_rounds(
            grid=CohortGrid([empty, FakeDevice("b")], perform),
            strategy=strategy(),
            state=fresh_state(),
            rounds=1,
            checkpoints=tmp_path,
            on_round=lambda _: None,
            min_devices=2,
            limits=RoundLimits(timeout=0.0),
        )


def test_fedit(tmp_path):
    grid = CohortGrid([FakeDevice("a"), FakeDevice("b")], perform, batched=False)
    state = run_rounds(
        grid=grid,
        strategy=strategy(aggregation=FedIT()),
        state=fresh_state(private=True),
        rounds=2,
        checkpoints=tmp_path,
        on_round=lambda _: None,
    )
    assert state.best_round == 2
    assert state.adapter["x"].a.shape == (3, 6)


def test_evaluation_cost_is_remembered(tmp_path):
    """A device may still evaluate after its last training, which counts as spent."""
    privacy = ExamplePrivacy(noise_multiplier=1.0, clip=1.0, sampling_rate=0.5, draws=1, delta=1e-3)
    hidden = EvaluationPrivacy(noise_multiplier=4.0, clip=0.1, pictures=5, delta=1e-3)
    devices = [FakeDevice(name) for name in "ab"]
    state = run_rounds(
        grid=CohortGrid(devices, perform),
        strategy=strategy(
            plan=replace(PLAN, privacy=privacy),
            evaluation_policy=EvaluationPolicy(interval=2, local_noise=hidden),
            selection=_FirstOnly(),
            accept_simulated=True,
        ),
        state=fresh_state(private=True),
        rounds=3,
        checkpoints=tmp_path,
        on_round=lambda _: None,
    )
    assert [device.requests.count("Evaluate") for device in devices] == [1, 1]
    assert [done.epsilon for done in state.history] == [None, 1.5, 2.0, 2.0]  # maximum that fake devices report
    assert [done.validation.gain is None for done in state.history] == [True, True, False, True]
    assert all(done.validation.spent == done.validation.devices == {} for done in state.history)
    assert {name: facts.epsilon for name, facts in state.devices.items()} == {"a": 2.0, "b": 2.0}
    assert state.devices["b"].steps == 0  # it only evaluated
    loaded = checkpoint.load(tmp_path, sites=SITES)
    assert (loaded.history, loaded.devices) == (state.history, state.devices)


class _FirstOnly:
    """Selects only the first device."""

    sensitivity = Sampling(data_independent=True, amplifies=False, reason="by name")

    def select(self, names, *, draw):
        return sorted(names)[:1] if draw else []


def test_personalize():
    grid = CohortGrid([FakeDevice("a"), FakeDevice("b")], perform)
    request = Personalize(
        run="run",
        round=1,
        adapter=encode(to_tensors(fresh_state().adapter)),
        rank=2,
        steps=1,
        batch_size=1,
        learning_rate=0.1,
        look_every=1,
        patience=1,
    )
    assert personalize(grid=grid, strategy=strategy(), request=request, timeout=1.0).devices == ("a", "b")


def test_timeout_applies_to_every_step(tmp_path):
    class Timed(CohortGrid):
        def send_and_receive(self, messages, *, timeout=None):
            batch = list(messages)
            timeouts.setdefault(batch[0].metadata.message_type, timeout)
            return super().send_and_receive(batch)

    timeouts = {}
    federate(
        compose("rounds=1 adapter.shared.rank=3 round_loop.timeout=77"),
        grid=Timed([FakeDevice("a")], perform),
        strategy=strategy(),
        plan=PLAN,
        saved=None,
        checkpoints=tmp_path,
        on_round=lambda _: None,
    )
    assert timeouts == {"query": 120.0, "train": 77.0, "evaluate": 77.0, "train.personalise": 77.0}
