"""Quantized downloads: server and devices agree on every byte, and the residual is not lost."""

from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import adapter_shapes, from_tensors, init_adapter, to_tensors
from protocol import quantization, records
from protocol.messages import Personalize, QuantizedFormat, Update
from protocol.tensor_codec import decode, encode
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.flexlora import FlexLoRA
from strategies.download import add_residual, encode_download, quantization_residual
from strategies.round.messages import to_messages
from strategies.server_optimizers import FedAvgM
from tests.helpers.fleet import PLAN, SITES, FakeDevice, handle, perform, strategy
from tests.helpers.means import random_adapter
from tests.strategies.test_strategy import same

precisions = pytest.mark.parametrize("precision", quantization.PRECISIONS)


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


@precisions
@given(size=st.integers(1, 5), seed=st.integers(0, 99))
def test_server_knows_the_decoded_adapter(precision, size, seed):
    current = random_adapter(size, seed)
    sent = encode_download(current, precision)
    assert sent.rounded == QuantizedFormat(precision=precision, rank=size)
    expected = {name: tuple(tensor.shape) for name, tensor in to_tensors(current).items()}
    assert same(from_tensors(quantization.decode(sent.data, expected, precision)), sent.adapter)
    assert encode_download(current, precision).data == sent.data  # reproducible
    result = add_residual(sent.adapter, quantization_residual(current, sent.adapter))
    assert all(torch.allclose(a, b, atol=1e-6) for s in current for a, b in zip(result[s], current[s], strict=True))


def test_full_precision_is_unchanged():
    current = random_adapter(3, 0)
    sent = encode_download(current, "fp32")
    assert (sent.data, sent.adapter, sent.rounded) == (encode(to_tensors(current)), current, None)


def test_residual_of_another_rank():
    small, large = random_adapter(2, 0), random_adapter(4, 1)
    grown = add_residual(large, to_tensors(small))
    assert torch.equal(grown["x"].a, torch.cat([large["x"].a[:2] + small["x"].a, large["x"].a[2:]]))
    shrunk = add_residual(small, to_tensors(large))
    assert torch.equal(shrunk["x"].b, small["x"].b + large["x"].b[:, :2])


def train(federated, current, step, *, number):
    """Run a round in which every device moves the decoded adapter by a constant."""
    arrays = records.adapter_to_record(encode(to_tensors(current)))
    grid, decoded = CohortGrid([FakeDevice("a"), FakeDevice("b")], perform), []
    replies = []
    for message in federated.configure_train(number, arrays, ConfigRecord(), grid):
        request = records.request_from_records("train", message.content)
        tensors = quantization.decode(
            request.adapter, adapter_shapes(SITES, request.rounded.rank), request.rounded.precision
        )
        decoded.append(tensors)
        name = "ab"[message.metadata.dst_node_id - 1]
        reply = _update(name, request.plan, {key: tensor + step for key, tensor in tensors.items()})
        replies.append(type(message)(records.reply_to_records(reply), reply_to=message))
    result, _ = federated.aggregate_train(number, replies)
    assert federated.trained.dropped == {}
    return from_tensors(decode(records.adapter_from_record(result), adapter_shapes(SITES, -1))), decoded


def _update(name, plan, tensors):
    return Update(
        device=name,
        run=plan.run,
        round=plan.round,
        rank=plan.rank,
        adapter=encode(tensors),
        release=False,
        seconds=1.0,
        joules=1.0,
        quality="estimate",
        loss=0.5,
        epsilon=None,
        events=3,
    )


@precisions
@pytest.mark.parametrize("server_optimizer", [None, FedAvgM(lr=1.0, momentum=0.0)])
def test_changes_below_the_quantization_step_add_up(precision, server_optimizer):
    """Thirty changes of 10⁻³ to numbers of about 1, which int4 rounds to 0.3 and int8 to 0.02."""
    federated, current = (
        strategy(aggregation=FedIT(), download=precision, server_optimizer=server_optimizer),
        init_adapter(SITES, 3, seed=0),
    )
    before = current
    for number in range(1, 31):
        current, _ = train(federated, current, 1e-3, number=number)
    for site in SITES:
        for after, earlier in zip(current[site], before[site], strict=True):
            assert torch.allclose(after - earlier, torch.full_like(after, 0.03), atol=1e-5)


def test_rotated_factors_have_no_residual():
    federated = strategy(aggregation=FlexLoRA(rank=3, seed=0), download="int8")
    current = random_adapter(3, 0, scale=0.3, sites={name: (site.inputs, site.outputs) for name, site in SITES.items()})
    result, (decoded, _) = train(federated, current, 0.0, number=1)
    for site in SITES:
        product = decoded[f"{site}.lora_B"] @ decoded[f"{site}.lora_A"]
        assert torch.allclose(result[site].b @ result[site].a, product, atol=1e-5)
        assert not torch.allclose(result[site].b @ result[site].a, current[site].b @ current[site].a, atol=1e-4)


def test_exact_adds_the_residual():
    federated = strategy(aggregation=Exact(rank=3, max_rank=3, seed=0), download="int8")
    current = random_adapter(3, 0, scale=0.3, sites={name: (site.inputs, site.outputs) for name, site in SITES.items()})
    current = Exact(rank=3, max_rank=3, seed=0).aggregate(current, [(current, 1.0)], round=1).adapter
    result, (decoded, _) = train(federated, current, 0.0, number=1)
    for site in SITES:
        wanted = current[site].b @ current[site].a
        distance = (result[site].b @ result[site].a - wanted).norm()
        assert distance < 0.2 * (decoded[f"{site}.lora_B"] @ decoded[f"{site}.lora_A"] - wanted).norm()


@precisions
def test_all_requests_are_quantized(precision):
    devices = [FakeDevice("a")]
    federated, grid = strategy(download=precision), CohortGrid(devices, perform)
    arrays = records.adapter_to_record(encode(to_tensors(random_adapter(3, 0, sites=_sides()))))
    trains = list(federated.configure_train(1, arrays, ConfigRecord(), grid))
    measures = list(federated.configure_evaluate(1, arrays, ConfigRecord(), grid))
    request = Personalize(
        run="run",
        round=1,
        adapter=records.adapter_from_record(arrays),
        rank=2,
        steps=1,
        batch_size=1,
        learning_rate=0.1,
        look_every=1,
        patience=1,
    )
    personal = to_messages(federated.personalization.request(request, grid).messages)
    result = [
        records.request_from_records(message.metadata.message_type, message.content)
        for message in (*trains, *measures, *personal)
    ]
    assert len({request.adapter for request in result}) == 1
    assert {request.rounded for request in result} == {QuantizedFormat(precision=precision, rank=3)}
    assert federated._training[1].bytes_down == len(result[0].adapter)


def _sides():
    return {name: (site.inputs, site.outputs) for name, site in SITES.items()}


def test_scaffold_requires_full_precision():
    with pytest.raises(ValueError, match=r"compression\.download=int8: .* SCAFFOLD's control variate"):
        strategy(plan=replace(PLAN, optimiser="sgd", scaffold=True), aggregation=FedIT(), download="int8")
