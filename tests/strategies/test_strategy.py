"""The strategy with well-behaved and misbehaving devices."""

from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message

from models.lora.adapter import Factors, adapter_shapes, from_tensors, init_adapter, rank, to_tensors
from privacy.policy import RequestRefusedError
from protocol import records
from protocol.messages import EvaluationPrivacy, ExamplePrivacy, PersonalizationMethod, Personalize
from protocol.tensor_codec import decode, encode
from server.rounds.loop import personalize
from simulations.grid.cohort import CohortGrid
from strategies.aggregation import Aggregated
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.planning.plan import CosineDecay, PlanLimits
from strategies.round.history import TrainingHistory
from strategies.round.metrics import DeviceMetrics
from strategies.round.private_evaluation import EvaluationPolicy
from strategies.selection.sample import Sample
from tests.helpers.fleet import PLAN, REPORT, SITES, FakeDevice, handle, perform, strategy
from training.round_work import steps_per_round

IDLE = dict.fromkeys(("rank", "steps", "bytes_down", "bytes_up"), 0) | {"seconds": 0.0, "joules": 0.0, "epsilon": None}
PRIVACY = ExamplePrivacy(noise_multiplier=1.0, clip=1.0, sampling_rate=0.5, draws=1, delta=1e-3)
NOISED = EvaluationPolicy(
    interval=2, local_noise=EvaluationPrivacy(noise_multiplier=4.0, clip=0.1, pictures=5, delta=1e-3)
)


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def start():
    return records.adapter_to_record(encode(to_tensors(init_adapter(SITES, 3, seed=0))))


def train(federated, devices, *, server_round=1, arrays=None):
    grid = CohortGrid(devices, perform)
    messages = federated.configure_train(server_round, arrays or start(), ConfigRecord(), grid)
    arrays, _ = federated.aggregate_train(server_round, grid.send_and_receive(messages))
    return (
        None if arrays is None else from_tensors(decode(records.adapter_from_record(arrays), adapter_shapes(SITES, -1)))
    )


def same(one, other):
    return all(torch.equal(a, b) for site in one for a, b in zip(one[site], other[site], strict=True))


def with_tensors(change):
    """Make a misbehavior that changes the tensors of an update."""

    def misbehave(reply):
        tensors = decode(reply.adapter, adapter_shapes(SITES, reply.rank))
        return replace(reply, adapter=encode(change(tensors)))

    return misbehave


def filled(value):
    return with_tensors(lambda tensors: {name: torch.full_like(tensor, value) for name, tensor in tensors.items()})


def other_rank(reply):
    return replace(reply, rank=2, adapter=encode(to_tensors(init_adapter(SITES, 2, seed=0))))


def raises(_reply):
    raise RuntimeError("battery empty")


def refuses(_reply):
    raise RequestRefusedError("this device allows less")


MISBEHAVIORS = {
    "failed": [raises],
    "refused": [refuses],
    "impostor": [lambda reply: replace(reply, device="b")],
    "stale": [lambda reply: replace(reply, round=7), lambda reply: replace(reply, run="other")],
    "rank": [other_rank],
    "codec": [
        filled(float("nan")),
        filled(float("inf")),
        with_tensors(lambda tensors: tensors | {"extra": torch.zeros(1)}),
        with_tensors(lambda tensors: {name.replace("x.", "z."): tensor for name, tensor in tensors.items()}),
        lambda reply: replace(reply, adapter=reply.adapter[:-1]),
        lambda reply: replace(reply, adapter=b""),
    ],
    "norm": [filled(1e6), filled(3e38), filled(15.0)],  # in the last one only the product is too large
    "malformed": [
        lambda reply: replace(reply, joules=-1.0),
        lambda reply: replace(reply, seconds=1e300),
        lambda reply: replace(reply, epsilon=-1.0),
        lambda reply: replace(reply, events=-1),
        lambda reply: replace(reply, events=10**4000),
        lambda reply: replace(reply, quality="guessed"),
        lambda reply: replace(reply, adapter=bytes(2**20)),
    ],
}


@pytest.mark.parametrize(
    ("reason", "misbehave"), [(reason, one) for reason, many in MISBEHAVIORS.items() for one in many]
)
def test_invalid_reply_is_rejected_and_counted(reason, misbehave):
    honest = [FakeDevice("b"), FakeDevice("c")]
    federated = strategy()
    result = train(federated, [FakeDevice("a", misbehave=misbehave), *honest])
    assert federated.trained.dropped == {reason: 1}
    assert (federated.trained.asked, federated.trained.replied) == (3, 2)
    assert same(result, train(strategy(), honest))  # as without it


def test_error_is_logged_as_one_printable_line(caplog):
    federated = strategy()
    grid = CohortGrid([FakeDevice("a")], perform)
    (message,) = federated.configure_train(1, start(), ConfigRecord(), grid)
    federated.aggregate_train(1, [Message(Error(2, "x" * 10**6 + "\n\x1b[2Jlast\ud800"), reply_to=message)])
    assert federated.trained.dropped == {"failed": 1}
    text = caplog.records[0].getMessage()
    assert text.endswith("error 2: ?[2Jlast?")
    assert text.isprintable()


def test_no_accepted_reply_keeps_the_adapter():
    federated = strategy()
    assert train(federated, [FakeDevice("a", misbehave=filled(float("nan")))]) is None
    metrics = federated.trained
    assert (metrics.replied, metrics.dropped, metrics.loss, metrics.bytes_up, metrics.diagnostics) == (
        0,
        {"codec": 1},
        None,
        0,
        {},
    )


def test_oversized_aggregate_keeps_the_adapter(monkeypatch, caplog):
    federated = strategy()
    oversized = {
        name: Factors(100 * factors.a, factors.b + 100) for name, factors in init_adapter(SITES, 3, seed=0).items()
    }
    monkeypatch.setattr(federated.update.aggregation, "aggregate", lambda *_, **__: Aggregated(oversized, {}))
    assert train(federated, [FakeDevice("a")]) is None
    assert federated.trained.replied == 1
    assert "devices would refuse the next" in caplog.text


def test_metrics_of_a_round():
    federated = strategy()
    train(federated, [FakeDevice("a"), FakeDevice("bbb")])
    metrics = federated.trained
    size = len(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    assert (metrics.asked, metrics.replied, metrics.dropped) == (2, 2, {})
    assert (metrics.bytes_down, metrics.bytes_up) == (2 * size, 2 * size)
    assert (metrics.seconds, metrics.joules, metrics.loss, metrics.epsilon) == (3.0, 4.0, 0.5, None)
    assert metrics.diagnostics["energy"] == pytest.approx(1.0)


def test_reported_epsilon_never_decreases():
    """The device with the largest ε stops replying, others reply or not, and the run is resumed."""
    settings = {"plan": replace(PLAN, privacy=PRIVACY), "evaluation_policy": NOISED, "accept_simulated": True}
    federated = strategy(**settings)

    devices = [FakeDevice("a"), FakeDevice("b")]

    def guaranteed_epsilon(number, *, a, b, by=federated):
        devices[0].misbehave, devices[1].misbehave = a, b
        train(by, devices, server_round=number)
        (guarantee,) = by.trained.guarantees
        assert guarantee.value == by.trained.epsilon
        return guarantee.value

    assert guaranteed_epsilon(1, a=lambda reply: replace(reply, epsilon=1.75), b=None) == 1.75
    assert guaranteed_epsilon(2, a=raises, b=None) == 1.75
    evaluate(federated, devices, server_round=2)
    assert [guaranteed_epsilon(3, a=raises, b=None), guaranteed_epsilon(4, a=raises, b=raises)] == [2.0, 2.0]
    resumed = strategy(**settings)
    resumed.history = TrainingHistory.of({"a": DeviceMetrics(**IDLE | {"epsilon": 3.0})})
    assert guaranteed_epsilon(5, a=raises, b=None, by=resumed) == 3.0


def test_ledger_events_are_echoed_to_each_device():
    """The echo is the largest count of the device's own accepted updates."""
    federated = strategy()

    def echoes():
        messages = federated.configure_train(1, start(), ConfigRecord(), CohortGrid(devices, perform))
        requests = [records.request_from_records("train", message.content) for message in messages]
        assert len({request.adapter for request in requests}) == 1
        assert {request.plan for request in requests} == {replace(PLAN, round=1)}
        return {name: request.echo for name, request in zip("abc", requests, strict=True)}

    def reporting(events):
        return lambda reply: replace(reply, events=events) if hasattr(reply, "events") else reply

    devices = [FakeDevice("a", misbehave=reporting(7)), FakeDevice("b"), FakeDevice("c", misbehave=filled(1e9))]
    assert echoes() == {"a": 0, "b": 0, "c": 0}
    train(federated, devices)
    assert echoes() == {"a": 7, "b": 3, "c": 0}
    assert federated.trained.devices["a"].events == 7
    devices[0].misbehave = reporting(2)
    train(federated, devices)
    assert echoes() == {"a": 7, "b": 3, "c": 0}
    federated.history = TrainingHistory.of({"b": DeviceMetrics(**IDLE, events=2), "c": DeviceMetrics(**IDLE, events=9)})
    assert echoes() == {"a": 0, "b": 2, "c": 9}


def test_false_event_counts_are_limited():
    """Otherwise the next device with this name would refuse every round, since it lacks those events."""
    grid = [FakeDevice("a")]
    federated = strategy()
    for number, events, expected in (
        (1, 10, 10),
        (2, 13, 13),
        (3, 2_000_000_000, 19),
        (5, 2_000_000_000, 31),
        (6, 4, 31),
    ):
        grid[0].misbehave = lambda reply, events=events: replace(reply, events=events)
        train(federated, grid, server_round=number)
        assert federated.history.events("a") == expected


def test_simulated_noise_is_no_release():
    private = replace(PLAN, privacy=PRIVACY)
    federated = strategy(plan=private)
    assert train(federated, [FakeDevice("a")]) is None
    assert federated.trained.dropped == {"not a release": 1}
    tolerant = strategy(plan=private, accept_simulated=True)
    assert train(tolerant, [FakeDevice("a")]) is not None
    assert (tolerant.trained.loss, tolerant.trained.epsilon) == (None, 1.5)


def test_unsolicited_repeated_and_late_replies():
    federated = strategy()
    grid = CohortGrid([FakeDevice("a"), FakeDevice("b"), FakeDevice("c")], perform)
    messages = list(federated.configure_train(1, start(), ConfigRecord(), grid))
    a, b, _ = grid.send_and_receive(messages)
    stranger = Message(b.content, reply_to=Message(b.content, 99, "train"))
    federated.aggregate_train(1, [a, a, stranger])
    assert federated.trained.dropped == {"not asked": 2}
    assert federated.trained.replied == 1
    list(federated.configure_train(1, start(), ConfigRecord(), grid))
    federated.aggregate_train(1, [a])
    assert federated.trained.dropped == {"no reply": 2}


def test_network_errors_are_distinguished():
    federated = strategy()
    grid = CohortGrid([FakeDevice("a"), FakeDevice("b")], perform)
    messages = list(federated.configure_train(1, start(), ConfigRecord(), grid))
    federated.aggregate_train(
        1, [Message(Error(5, "away"), reply_to=messages[0]), Message(Error(8), reply_to=messages[1])]
    )
    assert federated.trained.dropped == {"unreachable": 1, "failed": 1}


def test_order_of_replies_does_not_matter():
    devices = [FakeDevice(name) for name in "abcd"]
    federated, grid = strategy(), CohortGrid(devices, perform)
    replies = list(grid.send_and_receive(federated.configure_train(1, start(), ConfigRecord(), grid)))
    result, _ = federated.aggregate_train(1, replies[::-1])
    assert same(
        from_tensors(decode(records.adapter_from_record(result), adapter_shapes(SITES, -1))), train(strategy(), devices)
    )


def test_metered_devices_train_a_lower_rank():
    metered = FakeDevice("m", report=replace(REPORT, device="m", metered=True))
    federated = strategy(limits=PlanLimits(metered_rank=1))
    adapter = train(federated, [FakeDevice("a"), metered])
    assert federated.trained.replied == 2
    assert rank(adapter) >= 3
    with pytest.raises(ValueError, match="metered_rank"):
        strategy(aggregation=FedIT(), limits=PlanLimits(metered_rank=1))


def test_devices_are_queried_once():
    class ChangingGrid(CohortGrid):
        absent_node: int | None = None

        def get_node_ids(self):
            return [node for node in super().get_node_ids() if node != self.absent_node]

    devices = [
        FakeDevice("a"),
        FakeDevice("b", report=replace(REPORT, device="b", base="another")),
        FakeDevice("c", report=replace(REPORT, device="a")),  # the name is in use
        FakeDevice("d", report=replace(REPORT, device="d", uplink_mbps=0.0)),
        FakeDevice("e", report=replace(REPORT, device="e", watts=0.0)),
    ]
    federated, grid = strategy(limits=PlanLimits(joules=1.0)), ChangingGrid(devices, perform)
    for _ in range(2):
        assert {report.device for report in federated.query(grid).values()} == {"a"}
    assert [device.requests for device in devices] == [["Query"]] * 5
    assert list(federated.configure_train(1, start(), ConfigRecord(), grid))
    grid.absent_node = 1  # its name is free for node 3
    assert list(federated.query(grid)) == [3]
    grid.absent_node = None
    assert list(federated.query(grid)) == [3]


def test_evaluation_sample_changes_each_round():
    devices = [FakeDevice(name) for name in "abcdefgh"]
    federated = strategy(evaluation_selection=Sample(size=3, seed=0, purpose="evaluation"))
    grid, selected = CohortGrid(devices, perform), []
    for number in (1, 2, 1):
        messages = federated.configure_evaluate(number, start(), ConfigRecord(), grid)
        federated.aggregate_evaluate(number, grid.send_and_receive(messages))
        selected.append(set(federated.validation.devices))
    assert selected[0] == selected[2] != selected[1]
    assert all(len(names) == 3 for names in selected)
    assert federated.validation.dropped == {}
    everyone = strategy()
    assert len(list(everyone.configure_evaluate(1, start(), ConfigRecord(), grid))) == 8


def personalize_request():
    return Personalize(
        run="run",
        round=1,
        adapter=records.adapter_from_record(start()),
        rank=2,
        steps=1,
        batch_size=1,
        learning_rate=0.1,
        look_every=1,
        patience=1,
    )


def test_only_named_devices_personalize():
    devices = [FakeDevice(name) for name in "abc"]
    federated, grid = strategy(), CohortGrid(devices, perform)
    request = personalize_request()
    metrics = personalize(grid=grid, strategy=federated, request=request, devices={"c", "a", "away"}, timeout=1.0)
    assert (metrics.asked, metrics.devices, metrics.dropped) == (2, ("a", "c"), {})
    assert "Personalize" not in devices[1].requests


def test_only_the_sample_is_asked():
    devices = [FakeDevice(name) for name in "abcdef"]
    federated = strategy(selection=Sample(size=2, seed=0))
    train(federated, devices)
    assert federated.trained.asked == 2
    assert sum("Train" in device.requests for device in devices) == 2


def test_evaluation():
    federated = strategy()

    def stale(reply):
        return replace(reply, round=9)

    devices = [FakeDevice("a"), FakeDevice("b"), FakeDevice("c", misbehave=stale)]
    grid = CohortGrid(devices, perform)
    metrics = federated.aggregate_evaluate(
        1, grid.send_and_receive(federated.configure_evaluate(1, start(), ConfigRecord(), grid))
    )
    assert dict(metrics) == {"base": 1.0, "shared": 0.5}
    validation = federated.validation
    assert (validation.devices, validation.dropped) == ({"a": 0.5, "b": 0.5}, {"stale": 1})
    assert federated.aggregate_evaluate(1, []) is None
    assert federated.validation.shared is None


def evaluate(federated, devices, *, server_round):
    grid = CohortGrid(devices, perform)
    messages = list(federated.configure_evaluate(server_round, start(), ConfigRecord(), grid))
    return messages, federated.aggregate_evaluate(server_round, grid.send_and_receive(messages))


def test_private_run_requests_noised_gains():
    devices = [FakeDevice("a"), FakeDevice("bbb"), FakeDevice("c", misbehave=refuses)]
    federated = strategy(plan=replace(PLAN, privacy=PRIVACY), evaluation_policy=NOISED, accept_simulated=True)
    messages, metrics = evaluate(federated, devices, server_round=1)
    assert (messages, metrics) == ([], None)
    assert federated.validation.devices == {}
    assert all("Evaluate" not in device.requests for device in devices)
    messages, metrics = evaluate(federated, devices, server_round=2)
    assert len(messages) == 3
    assert dict(metrics) == pytest.approx({"gain": 0.2, "gain_error": 4.0 * 0.1 / (5 * 2**0.5)})
    assert (federated.validation.base, federated.validation.shared) == (None, None)
    assert federated.validation.dropped == {"refused": 1}
    assert federated.validation.spent == {"a": 2.0, "bbb": 2.0}
    assert federated.validation.epsilon == 2.0


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("malformed", {"base": 0.5}),
        ("malformed", {"shared": 0.5}),
        ("malformed", {"gain": None}),
        ("malformed", {"epsilon": None}),
        ("malformed", {"epsilon": -1.0}),
        ("malformed", {"gain": -1e13}),
        ("malformed", {"gain": 1e13}),
        ("stale", {"round": 9}),
        ("impostor", {"device": "b"}),
    ],
)
def test_invalid_gain_is_rejected(reason, change):
    federated = strategy(plan=replace(PLAN, privacy=PRIVACY), evaluation_policy=NOISED, accept_simulated=True)
    devices = [FakeDevice("a", misbehave=lambda reply: replace(reply, **change)), FakeDevice("b")]
    _, metrics = evaluate(federated, devices, server_round=2)
    assert federated.validation.dropped == {reason: 1}
    assert metrics["gain"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"base": None},
        {"shared": None},
        {"gain": 0.1},
        {"epsilon": 1.0},
        {"base": -1.0},
        {"shared": 1e13},
    ],
)
def test_invalid_loss_is_rejected(change):
    federated = strategy()
    devices = [FakeDevice("a", misbehave=lambda reply: replace(reply, **change)), FakeDevice("b")]
    evaluate(federated, devices, server_round=1)
    assert federated.validation.dropped == {"malformed": 1}
    assert federated.validation.devices == {"b": 0.5}


def test_reproducibly_noised_gain_is_no_release():
    federated = strategy(plan=replace(PLAN, privacy=PRIVACY), evaluation_policy=NOISED)
    _, metrics = evaluate(federated, [FakeDevice("a")], server_round=2)
    assert metrics is None
    assert federated.validation.dropped == {"not a release": 1}


def test_private_run_requests_no_losses():
    with pytest.raises(ValueError, match="without noise"):
        strategy(plan=replace(PLAN, privacy=PRIVACY), evaluation_policy=EvaluationPolicy())
    device = FakeDevice("a")
    grid = CohortGrid([device], perform)
    strategy(plan=replace(PLAN, privacy=PRIVACY), accept_simulated=True).start(grid, start(), num_rounds=2)
    assert device.requests.count("Train") == 2
    assert "Evaluate" not in device.requests


def test_personalization():
    federated = strategy()
    devices = [FakeDevice("a"), FakeDevice("b", misbehave=raises)]
    grid = CohortGrid(devices, perform)
    request = personalize_request()
    metrics = personalize(grid=grid, strategy=federated, request=request, timeout=1.0)
    assert (metrics.asked, metrics.devices, metrics.dropped, metrics.seconds, metrics.joules) == (
        2,
        ("a",),
        {"failed": 1},
        3.0,
        4.0,
    )


def test_personalization_plan_has_the_steps_of_its_method():
    federated, grid = strategy(), CohortGrid([FakeDevice("a")], perform)
    request = replace(personalize_request(), steps=5, batch_size=3, method=PersonalizationMethod(name="prior"))
    sent = federated.personalization.request(request, grid)
    assert (steps_per_round(sent.plan), sent.plan.batch_size) == (10, 3)


def test_flower_round_loop():
    devices = [FakeDevice("a"), FakeDevice("b", misbehave=filled(float("nan")))]
    grid = CohortGrid(devices, perform)
    result = strategy().start(grid, start(), num_rounds=2)
    adapter = from_tensors(decode(records.adapter_from_record(result.arrays), adapter_shapes(SITES, -1)))
    assert rank(adapter) >= 3
    assert result.evaluate_metrics_clientapp[2]["shared"] == pytest.approx(1 / 3)


def test_invalid_arrays_are_refused():
    grid = CohortGrid([FakeDevice("a")], perform)
    with pytest.raises(Exception, match="one safetensors entry"):
        strategy().configure_train(1, ArrayRecord(), ConfigRecord(), grid)


def test_learning_rate_schedule():
    grid = CohortGrid([FakeDevice("a")], perform)

    def learning_rate(federated, number):
        (message,) = federated.configure_train(number, start(), ConfigRecord(), grid)
        return records.request_from_records(records.TRAIN, message.content).plan.learning_rate

    assert [learning_rate(strategy(), number) for number in (1, 4)] == [PLAN.learning_rate] * 2
    decaying = strategy(lr_schedule=CosineDecay(rounds=6))
    assert [learning_rate(decaying, number) for number in (1, 4)] == pytest.approx(
        [PLAN.learning_rate, PLAN.learning_rate / 2]
    )


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_quantized_changes_are_added_to_the_adapter(precision):
    """The result differs from the full-precision mean by at most a quantization step."""
    devices = [FakeDevice("a"), FakeDevice("b")]
    full = train(strategy(aggregation=FedIT()), devices)
    federated = strategy(aggregation=FedIT(), plan=replace(PLAN, update=precision))
    rounded = train(federated, devices)
    steps = {"fp16": 2**-10, "int8": 1 / 127, "int4": 1 / 7}
    for site in SITES:
        for one, other in zip(rounded[site], full[site], strict=True):
            assert not torch.equal(one, other)
            assert torch.allclose(
                one, other, rtol=0, atol=0.1 * 4 * steps[precision]
            )  # updates are normal with σ = 0.1
    blocks, code_bytes = 4, {"fp16": 128, "int8": 64, "int4": 32}[precision]  # one per factor
    assert federated.trained.bytes_up == 2 * blocks * (2 + code_bytes)


def rounded(change):
    """Make a misbehavior that changes the bytes of a quantized update."""
    return lambda reply: replace(reply, adapter=change(bytearray(reply.adapter)))


def scaled(exponent):
    """Make a misbehavior that sets every scale to this bfloat16."""
    return rounded(lambda data: bytes(exponent.to_bytes(2, "little") * 4 + data[8:]))


@pytest.mark.parametrize(
    ("reason", "misbehave"),
    [
        ("codec", rounded(lambda data: bytes(data[:-1]))),
        ("malformed", rounded(lambda data: bytes(data) + bytes(32))),  # over the largest payload: it is not decoded
        ("codec", rounded(lambda data: bytes(data[:-32]))),
        ("codec", scaled(0x7F80)),
        ("codec", scaled(0x7FC0)),
        ("norm", scaled(0x4780)),
        ("malformed", lambda reply: replace(reply, adapter=encode(to_tensors(init_adapter(SITES, 3, seed=0))))),
    ],
)
def test_invalid_quantized_change_is_rejected(reason, misbehave):
    plan = replace(PLAN, update="int4")
    without = train(strategy(plan=plan), [FakeDevice("a")])
    federated = strategy(plan=plan)
    result = train(federated, [FakeDevice("a"), FakeDevice("b", misbehave=misbehave)])
    assert federated.trained.dropped == {reason: 1}
    assert same(result, without)


def test_metered_devices_quantize_a_lower_rank():
    devices = [FakeDevice("a"), FakeDevice("b", report=replace(REPORT, device="b", metered=True))]
    federated = strategy(plan=replace(PLAN, update="int8"), limits=PlanLimits(metered_rank=1))
    assert train(federated, devices)
    assert [metrics.rank for metrics in federated.trained.devices.values()] == [3, 1]


@pytest.mark.parametrize("rule", [FedIT(), Exact(rank=3, max_rank=None, seed=0)], ids=lambda rule: type(rule).__name__)
def test_metered_devices_send_fewer_bits(rule):
    devices = [FakeDevice("a"), FakeDevice("b", report=replace(REPORT, device="b", metered=True))]
    limits = PlanLimits(metered_update="int4", feedback=rule.stable_factors)
    result, full = strategy(aggregation=rule, limits=limits), strategy(aggregation=rule)
    mixed, without = train(result, devices), train(full, devices)
    bytes_a, bytes_b = result.trained.devices["a"].bytes_up, result.trained.devices["b"].bytes_up
    assert bytes_a == full.trained.devices["b"].bytes_up > bytes_b
    assert result.trained.replied == 2
    assert not same(mixed, without)
    with pytest.raises(ValueError, match="metered_upload=int4 with feedback: the residual can't be used"):
        strategy(limits=PlanLimits(metered_update="int4", feedback=True))


def test_fewer_bytes_allow_more_steps():
    limits = PlanLimits(deadline=12.0)
    steps = {}
    for update, keep in [("fp32", 1.0), ("int4", 1.0), ("int4", 0.25)]:
        plan = replace(PLAN, steps=100, update=update, keep=keep, feedback=keep < 1)
        report = replace(REPORT, device="a", uplink_mbps=1e-4, examples_per_second=40.0)
        federated = strategy(aggregation=FedIT(), plan=plan, limits=limits)
        messages = federated.configure_train(
            1, start(), ConfigRecord(), CohortGrid([FakeDevice("a", report=report)], perform)
        )
        (message,) = messages
        steps[update, keep] = records.request_from_records("train", message.content).plan.steps
    upload = 3 * (6 + 5 + 4 + 7) * 8 / 100  # seconds per byte of a number
    assert steps["fp32", 1.0] == 1  # not even the upload meets the deadline
    assert upload * 0.5 < 12 < upload * 4
    assert 1 < steps["int4", 1.0] < steps["int4", 0.25] <= 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.5}, "the residual can't be used in a later round"),
        ({"keep": 0.0, "feedback": True}, "over 0"),
        ({"feedback": True}, "the residual can't be used in a later round"),
    ],
)
def test_invalid_quantization_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        strategy(plan=replace(PLAN, update="int4", **changes))
