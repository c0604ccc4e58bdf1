"""The strategy against devices that misbehave in every way that we know of."""

from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message

from models.lora.adapter import Factors, adapter_shapes, from_tensors, init_adapter, rank, to_tensors
from privacy.policy import RequestRefusedError
from protocol import records
from protocol.messages import EvaluationPrivacy, ExamplePrivacy, Personalize
from protocol.tensor_codec import decode, encode
from simulations.grid.cohort import CohortGrid
from strategies.aggregation import Aggregated
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.planning.plan import CosineDecay, PlanLimits
from strategies.private_evaluation import EvaluationPolicy
from strategies.round.metrics import DeviceMetrics
from strategies.selection.sample import Sample
from tests.helpers.fleet import PLAN, REPORT, SITES, FakeDevice, handle, perform, strategy

IDLE = dict.fromkeys(("rank", "steps", "bytes_down", "bytes_up"), 0) | {"seconds": 0.0, "joules": 0.0, "epsilon": None}
PRIVACY = ExamplePrivacy(noise_multiplier=1.0, clip=1.0, sampling_rate=0.5, draws=1, delta=1e-3)
NOISED = EvaluationPolicy(
    every=2, local_noise=EvaluationPrivacy(noise_multiplier=4.0, clip=0.1, pictures=5, delta=1e-3)
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
    """Misbehaviour: the same update with other tensors."""

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


MISBEHAVIOURS = {
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
    "norm": [filled(1e6), filled(3e38), filled(15.0)],  # of the last only the product's
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
    ("reason", "misbehave"), [(reason, one) for reason, many in MISBEHAVIOURS.items() for one in many]
)
def test_a_bad_reply_is_dropped_and_counted(reason, misbehave):
    good = [FakeDevice("b"), FakeDevice("c")]
    federated = strategy()
    found = train(federated, [FakeDevice("a", misbehave=misbehave), *good])
    assert federated.trained.dropped == {reason: 1}
    assert (federated.trained.asked, federated.trained.replied) == (3, 2)
    assert same(found, train(strategy(), good))  # as if it had never been there


def test_what_a_device_calls_its_error_is_one_printable_line(caplog):
    federated = strategy()
    grid = CohortGrid([FakeDevice("a")], perform)
    (message,) = federated.configure_train(1, start(), ConfigRecord(), grid)
    federated.aggregate_train(1, [Message(Error(2, "x" * 10**6 + "\n\x1b[2Jlast\ud800"), reply_to=message)])
    assert federated.trained.dropped == {"failed": 1}
    text = caplog.records[0].getMessage()
    assert text.endswith("error 2: ?[2Jlast?")
    assert text.isprintable()


def test_nobody_good_keeps_the_adapter():
    federated = strategy()
    assert train(federated, [FakeDevice("a", misbehave=filled(float("nan")))]) is None
    facts = federated.trained
    assert (facts.replied, facts.dropped, facts.loss, facts.bytes_up, facts.diagnostics) == (
        0,
        {"codec": 1},
        None,
        0,
        {},
    )


def test_an_adapter_that_every_device_would_refuse_is_not_made_of_updates_that_were_let_in(monkeypatch, caplog):
    federated = strategy()
    far = {name: Factors(100 * factors.a, factors.b + 100) for name, factors in init_adapter(SITES, 3, seed=0).items()}
    monkeypatch.setattr(federated._aggregation, "aggregate", lambda *_, **__: Aggregated(far, {}))
    assert train(federated, [FakeDevice("a")]) is None
    assert federated.trained.replied == 1
    assert "devices would refuse the next" in caplog.text


def test_facts_of_a_good_round():
    federated = strategy()
    train(federated, [FakeDevice("a"), FakeDevice("bbb")])
    facts = federated.trained
    size = len(encode(to_tensors(init_adapter(SITES, 3, seed=0))))
    assert (facts.asked, facts.replied, facts.dropped) == (2, 2, {})
    assert (facts.bytes_down, facts.bytes_up) == (2 * size, 2 * size)
    assert (facts.seconds, facts.joules, facts.loss, facts.epsilon) == (3.0, 4.0, 0.5, None)
    assert facts.diagnostics["energy"] == pytest.approx(1.0)


def test_what_was_promised_so_far_never_shrinks():
    """Whoever paid most replies no more, another is measured, nobody replies, and the run goes on elsewhere."""
    settings = {"plan": replace(PLAN, privacy=PRIVACY), "measuring": NOISED, "accept_simulated": True}
    federated = strategy(**settings)

    devices = [FakeDevice("a"), FakeDevice("b")]

    def promised(number, *, a, b, by=federated):
        devices[0].misbehave, devices[1].misbehave = a, b
        train(by, devices, server_round=number)
        (guarantee,) = by.trained.guarantees
        assert guarantee.value == by.trained.epsilon
        return guarantee.value

    assert promised(1, a=lambda reply: replace(reply, epsilon=1.75), b=None) == 1.75
    assert promised(2, a=raises, b=None) == 1.75
    evaluate(federated, devices, server_round=2)
    assert [promised(3, a=raises, b=None), promised(4, a=raises, b=raises)] == [2.0, 2.0]
    resumed = strategy(**settings)
    resumed.remember({"a": DeviceMetrics(**IDLE | {"epsilon": 3.0})})
    assert promised(5, a=raises, b=None, by=resumed) == 3.0


def test_each_device_is_told_how_far_its_ledger_had_come():
    """The largest count of a good update; nobody else's, and no smaller one later."""
    federated = strategy()

    def echoes():
        messages = federated.configure_train(1, start(), ConfigRecord(), CohortGrid(devices, perform))
        requests = [records.request_from_records("train", message.content) for message in messages]
        assert len({request.adapter for request in requests}) == 1
        assert {request.plan for request in requests} == {replace(PLAN, round=1)}
        return {name: request.echo for name, request in zip("abc", requests, strict=True)}

    def told(events):
        return lambda reply: replace(reply, events=events) if hasattr(reply, "events") else reply

    devices = [FakeDevice("a", misbehave=told(7)), FakeDevice("b"), FakeDevice("c", misbehave=filled(1e9))]
    assert echoes() == {"a": 0, "b": 0, "c": 0}
    train(federated, devices)
    assert echoes() == {"a": 7, "b": 3, "c": 0}
    assert federated.trained.devices["a"].events == 7
    devices[0].misbehave = told(2)
    train(federated, devices)
    assert echoes() == {"a": 7, "b": 3, "c": 0}
    federated.remember({"b": DeviceMetrics(**IDLE, events=2), "c": DeviceMetrics(**IDLE, events=9)})
    assert echoes() == {"a": 7, "b": 3, "c": 9}


def test_a_device_that_lies_does_not_make_its_ledger_longer_than_rounds_can():
    """Whoever has its name next would refuse every round for want of those events."""
    grid = [FakeDevice("a")]
    federated = strategy()
    for number, told, known in ((1, 10, 10), (2, 13, 13), (3, 2_000_000_000, 19), (5, 2_000_000_000, 31), (6, 4, 31)):
        grid[0].misbehave = lambda reply, told=told: replace(reply, events=told)
        train(federated, grid, server_round=number)
        assert federated._history.events("a") == known


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


def test_errors_of_the_network_are_told_apart():
    federated = strategy()
    grid = CohortGrid([FakeDevice("a"), FakeDevice("b")], perform)
    messages = list(federated.configure_train(1, start(), ConfigRecord(), grid))
    federated.aggregate_train(
        1, [Message(Error(5, "away"), reply_to=messages[0]), Message(Error(8), reply_to=messages[1])]
    )
    assert federated.trained.dropped == {"unreachable": 1, "failed": 1}


def test_the_order_of_replies_and_nodes_does_not_matter():
    devices = [FakeDevice(name) for name in "abcd"]
    federated, grid = strategy(), CohortGrid(devices, perform)
    replies = list(grid.send_and_receive(federated.configure_train(1, start(), ConfigRecord(), grid)))
    found, _ = federated.aggregate_train(1, replies[::-1])
    assert same(
        from_tensors(decode(records.adapter_from_record(found), adapter_shapes(SITES, -1))), train(strategy(), devices)
    )


def test_metered_devices_train_fewer_directions():
    metered = FakeDevice("m", report=replace(REPORT, device="m", metered=True))
    federated = strategy(limits=PlanLimits(metered_rank=1))
    adapter = train(federated, [FakeDevice("a"), metered])
    assert federated.trained.replied == 2
    assert rank(adapter) >= 3
    with pytest.raises(ValueError, match="metered_rank"):
        strategy(aggregation=FedIT(), limits=PlanLimits(metered_rank=1))


def test_devices_are_queried_once_and_unfit_ones_never_asked():
    class Changing(CohortGrid):
        away: int | None = None

        def get_node_ids(self):
            return [node for node in super().get_node_ids() if node != self.away]

    devices = [
        FakeDevice("a"),
        FakeDevice("b", report=replace(REPORT, device="b", base="another")),
        FakeDevice("c", report=replace(REPORT, device="a")),  # the name is taken
        FakeDevice("d", report=replace(REPORT, device="d", uplink_mbps=0.0)),
        FakeDevice("e", report=replace(REPORT, device="e", watts=0.0)),
    ]
    federated, grid = strategy(limits=PlanLimits(joules=1.0)), Changing(devices, perform)
    for _ in range(2):
        assert {report.device for report in federated.query(grid).values()} == {"a"}
    assert [device.heard for device in devices] == [["Query"]] * 5
    assert list(federated.configure_train(1, start(), ConfigRecord(), grid))
    grid.away = 1  # back as node 3, say: its name is free again
    assert list(federated.query(grid)) == [3]
    grid.away = None
    assert list(federated.query(grid)) == [3]


def test_a_sample_measures_and_another_one_each_round():
    devices = [FakeDevice(name) for name in "abcdefgh"]
    federated = strategy(evaluation=Sample(size=3, seed=0, purpose="evaluation"))
    grid, asked = CohortGrid(devices, perform), []
    for number in (1, 2, 1):
        messages = federated.configure_evaluate(number, start(), ConfigRecord(), grid)
        federated.aggregate_evaluate(number, grid.send_and_receive(messages))
        asked.append(set(federated.validation.devices))
    assert asked[0] == asked[2] != asked[1]
    assert all(len(names) == 3 for names in asked)
    assert federated.validation.dropped == {}
    everybody = strategy()
    assert len(list(everybody.configure_evaluate(1, start(), ConfigRecord(), grid))) == 8


def test_only_those_named_personalise():
    devices = [FakeDevice(name) for name in "abc"]
    federated, grid = strategy(), CohortGrid(devices, perform)
    request = Personalize(
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
    messages = federated.configure_personalise(request, grid, {"c", "a", "away"})
    facts = federated.aggregate_personalise(grid.send_and_receive(messages))
    assert (facts.asked, facts.devices, facts.dropped) == (2, ("a", "c"), {})
    assert "Personalise" not in devices[1].heard


def test_a_sample_is_asked():
    devices = [FakeDevice(name) for name in "abcdef"]
    federated = strategy(selection=Sample(size=2, seed=0))
    train(federated, devices)
    assert federated.trained.asked == 2
    assert sum("Train" in device.heard for device in devices) == 2


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


def test_a_private_run_asks_for_noised_gains_when_they_are_due():
    devices = [FakeDevice("a"), FakeDevice("bbb"), FakeDevice("c", misbehave=refuses)]
    federated = strategy(plan=replace(PLAN, privacy=PRIVACY), measuring=NOISED, accept_simulated=True)
    messages, metrics = evaluate(federated, devices, server_round=1)
    assert (messages, metrics) == ([], None)
    assert federated.validation.devices == {}
    assert all("Evaluate" not in device.heard for device in devices)
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
def test_a_bad_gain_is_dropped_and_counted(reason, change):
    federated = strategy(plan=replace(PLAN, privacy=PRIVACY), measuring=NOISED, accept_simulated=True)
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
def test_a_bad_loss_is_dropped_and_counted(change):
    federated = strategy()
    devices = [FakeDevice("a", misbehave=lambda reply: replace(reply, **change)), FakeDevice("b")]
    evaluate(federated, devices, server_round=1)
    assert federated.validation.dropped == {"malformed": 1}
    assert federated.validation.devices == {"b": 0.5}


def test_a_gain_noised_by_a_known_seed_is_no_release():
    federated = strategy(plan=replace(PLAN, privacy=PRIVACY), measuring=NOISED)
    _, metrics = evaluate(federated, [FakeDevice("a")], server_round=2)
    assert metrics is None
    assert federated.validation.dropped == {"not a release": 1}


def test_a_private_run_never_asks_for_open_losses():
    with pytest.raises(ValueError, match="without noise"):
        strategy(plan=replace(PLAN, privacy=PRIVACY), measuring=EvaluationPolicy())
    device = FakeDevice("a")
    grid = CohortGrid([device], perform)
    strategy(plan=replace(PLAN, privacy=PRIVACY), accept_simulated=True).start(grid, start(), num_rounds=2)
    assert device.heard.count("Train") == 2
    assert "Evaluate" not in device.heard


def test_personalisation():
    federated = strategy()
    devices = [FakeDevice("a"), FakeDevice("b", misbehave=raises)]
    grid = CohortGrid(devices, perform)
    request = Personalize(
        run="run", round=1, adapter=b"x", rank=2, steps=1, batch_size=1, learning_rate=0.1, look_every=1, patience=1
    )
    facts = federated.aggregate_personalise(grid.send_and_receive(federated.configure_personalise(request, grid)))
    assert (facts.asked, facts.devices, facts.dropped, facts.seconds, facts.joules) == (
        2,
        ("a",),
        {"failed": 1},
        3.0,
        4.0,
    )


def test_flowers_own_loop_runs_it():
    devices = [FakeDevice("a"), FakeDevice("b", misbehave=filled(float("nan")))]
    grid = CohortGrid(devices, perform)
    result = strategy().start(grid, start(), num_rounds=2)
    adapter = from_tensors(decode(records.adapter_from_record(result.arrays), adapter_shapes(SITES, -1)))
    assert rank(adapter) >= 3
    assert result.evaluate_metrics_clientapp[2]["shared"] == pytest.approx(1 / 3)


def test_arrays_of_another_kind_are_refused():
    grid = CohortGrid([FakeDevice("a")], perform)
    with pytest.raises(Exception, match="one safetensors entry"):
        strategy().configure_train(1, ArrayRecord(), ConfigRecord(), grid)


def test_the_rate_of_a_plan_falls_over_the_rounds_if_it_is_to():
    grid = CohortGrid([FakeDevice("a")], perform)

    def rate(federated, number):
        (message,) = federated.configure_train(number, start(), ConfigRecord(), grid)
        return records.request_from_records(records.TRAIN, message.content).plan.learning_rate

    assert [rate(strategy(), number) for number in (1, 4)] == [PLAN.learning_rate] * 2
    falling = strategy(decay=CosineDecay(rounds=6))
    assert [rate(falling, number) for number in (1, 4)] == pytest.approx([PLAN.learning_rate, PLAN.learning_rate / 2])


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_rounded_changes_are_added_to_what_was_sent(precision):
    """The mean of whole updates, off by a step of them at most; the bytes are those that were sent."""
    devices = [FakeDevice("a"), FakeDevice("b")]
    full = train(strategy(aggregation=FedIT()), devices)
    federated = strategy(aggregation=FedIT(), plan=replace(PLAN, update=precision))
    rounded = train(federated, devices)
    steps = {"fp16": 2**-10, "int8": 1 / 127, "int4": 1 / 7}
    for site in SITES:
        for one, other in zip(rounded[site], full[site], strict=True):
            assert not torch.equal(one, other)
            assert torch.allclose(one, other, rtol=0, atol=0.1 * 4 * steps[precision])  # normal numbers of 0.1
    blocks, code_bytes = 4, {"fp16": 128, "int8": 64, "int4": 32}[precision]  # one for each factor
    assert federated.trained.bytes_up == 2 * blocks * (2 + code_bytes)


def rounded(change):
    """Misbehaviour: the same update with other bytes of a rounded change."""
    return lambda reply: replace(reply, adapter=change(bytearray(reply.adapter)))


def scaled(exponent):
    """With this bfloat16 for every scale."""
    return rounded(lambda data: bytes(exponent.to_bytes(2, "little") * 4 + data[8:]))


@pytest.mark.parametrize(
    ("reason", "misbehave"),
    [
        ("codec", rounded(lambda data: bytes(data[:-1]))),
        ("malformed", rounded(lambda data: bytes(data) + bytes(32))),  # over the most: its bytes aren't looked at
        ("codec", rounded(lambda data: bytes(data[:-32]))),
        ("codec", scaled(0x7F80)),
        ("codec", scaled(0x7FC0)),
        ("norm", scaled(0x4780)),
        ("malformed", lambda reply: replace(reply, adapter=encode(to_tensors(init_adapter(SITES, 3, seed=0))))),
    ],
)
def test_a_bad_rounded_change_is_dropped_and_counted(reason, misbehave):
    plan = replace(PLAN, update="int4")
    alone = train(strategy(plan=plan), [FakeDevice("a")])
    federated = strategy(plan=plan)
    found = train(federated, [FakeDevice("a"), FakeDevice("b", misbehave=misbehave)])
    assert federated.trained.dropped == {reason: 1}
    assert same(found, alone)


def test_metered_devices_round_fewer_directions():
    devices = [FakeDevice("a"), FakeDevice("b", report=replace(REPORT, device="b", metered=True))]
    federated = strategy(plan=replace(PLAN, update="int8"), limits=PlanLimits(metered_rank=1))
    assert train(federated, devices)
    assert [facts.rank for facts in federated.trained.devices.values()] == [3, 1]


@pytest.mark.parametrize("rule", [FedIT(), Exact(rank=3, max_rank=None, seed=0)], ids=lambda rule: type(rule).__name__)
def test_metered_devices_send_fewer_bits_beside_others_that_send_all(rule):
    devices = [FakeDevice("a"), FakeDevice("b", report=replace(REPORT, device="b", metered=True))]
    limits = PlanLimits(metered_update="int4", feedback=rule.stable_factors)
    found, whole = strategy(aggregation=rule, limits=limits), strategy(aggregation=rule)
    mixed, alone = train(found, devices), train(whole, devices)
    of_a, of_b = found.trained.devices["a"].bytes_up, found.trained.devices["b"].bytes_up
    assert of_a == whole.trained.devices["b"].bytes_up > of_b
    assert found.trained.replied == 2
    assert not same(mixed, alone)
    with pytest.raises(ValueError, match="directions that keep their meaning"):
        strategy(limits=PlanLimits(metered_update="int4", feedback=True))


def test_fewer_bytes_leave_more_steps_before_a_deadline():
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
    upload = 3 * (6 + 5 + 4 + 7) * 8 / 100  # bytes by numbers: seconds for each byte of a number
    assert steps["fp32", 1.0] == 1  # not even the upload fits
    assert upload * 0.5 < 12 < upload * 4
    assert 1 < steps["int4", 1.0] < steps["int4", 0.25] <= 100


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": 0.5}, "only with feedback"),
        ({"keep": 0.0, "feedback": True}, "over 0"),
        ({"feedback": True}, "directions that keep their meaning"),
    ],
)
def test_a_plan_that_rounds_badly_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        strategy(plan=replace(PLAN, update="int4", **changes))
