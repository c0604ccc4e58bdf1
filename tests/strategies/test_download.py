"""Adapters sent in few bits: server and devices agree on every byte, and what rounding takes is not lost."""

from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from models.lora.adapter import adapter_shapes, from_tensors, init_adapter, to_tensors
from protocol import quantization, records
from protocol.messages import Personalize, QuantizedFormat, Update
from protocol.tensor_codec import decode, encode
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.flexlora import FlexLoRA
from strategies.download import add_residual, download, lost
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
@settings(max_examples=20, deadline=None)
def test_what_is_read_is_what_the_server_counts_from(precision, size, seed):
    held = random_adapter(size, seed)
    sent = download(held, precision)
    assert sent.rounded == QuantizedFormat(precision=precision, rank=size)
    expected = {name: tuple(tensor.shape) for name, tensor in to_tensors(held).items()}
    assert same(from_tensors(quantization.decode(sent.data, expected, precision)), sent.adapter)
    assert download(held, precision).data == sent.data  # whenever it is sent
    found = add_residual(sent.adapter, lost(held, sent.adapter))
    assert all(torch.allclose(a, b, atol=1e-6) for s in held for a, b in zip(found[s], held[s], strict=True))


def test_whole_is_as_it_was():
    held = random_adapter(3, 0)
    sent = download(held, "fp32")
    assert (sent.data, sent.adapter, sent.rounded) == (encode(to_tensors(held)), held, None)


def test_what_was_lost_of_another_rank():
    small, large = random_adapter(2, 0), random_adapter(4, 1)
    grown = add_residual(large, to_tensors(small))
    assert torch.equal(grown["x"].a, torch.cat([large["x"].a[:2] + small["x"].a, large["x"].a[2:]]))
    shrunk = add_residual(small, to_tensors(large))
    assert torch.equal(shrunk["x"].b, small["x"].b + large["x"].b[:, :2])


def train(federated, held, moves, *, number):
    """One round in which every device moves what it read by so much."""
    arrays = records.adapter_to_record(encode(to_tensors(held)))
    grid, read = CohortGrid([FakeDevice("a"), FakeDevice("b")], perform), []
    replies = []
    for message in federated.configure_train(number, arrays, ConfigRecord(), grid):
        request = records.request_from_records("train", message.content)
        tensors = quantization.decode(
            request.adapter, adapter_shapes(SITES, request.rounded.rank), request.rounded.precision
        )
        read.append(tensors)
        name = "ab"[message.metadata.dst_node_id - 1]
        reply = _update(name, request.plan, {key: tensor + moves for key, tensor in tensors.items()})
        replies.append(type(message)(records.reply_to_records(reply), reply_to=message))
    found, _ = federated.aggregate_train(number, replies)
    assert federated.trained.dropped == {}
    return from_tensors(decode(records.adapter_from_record(found), adapter_shapes(SITES, -1))), read


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
@pytest.mark.parametrize("optimiser", [None, FedAvgM(rate=1.0, momentum=0.0)])
def test_small_changes_add_up_though_each_is_below_the_grid(precision, optimiser):
    """Thirty rounds of 10⁻³ on numbers of about 1, which int4 holds to 0.3 and int8 to 0.02."""
    federated, held = (
        strategy(aggregation=FedIT(), download=precision, optimiser=optimiser),
        init_adapter(SITES, 3, seed=0),
    )
    before = held
    for number in range(1, 31):
        held, _ = train(federated, held, 1e-3, number=number)
    for site in SITES:
        for now, then in zip(held[site], before[site], strict=True):
            assert torch.allclose(now - then, torch.full_like(now, 0.03), atol=1e-5)


def test_of_turned_factors_nothing_is_carried():
    federated = strategy(aggregation=FlexLoRA(rank=3, seed=0), download="int8")
    held = random_adapter(3, 0, scale=0.3, sites={name: (site.inputs, site.outputs) for name, site in SITES.items()})
    found, (read, _) = train(federated, held, 0.0, number=1)
    for site in SITES:
        product = read[f"{site}.lora_B"] @ read[f"{site}.lora_A"]
        assert torch.allclose(found[site].b @ found[site].a, product, atol=1e-5)
        assert not torch.allclose(found[site].b @ found[site].a, held[site].b @ held[site].a, atol=1e-4)


def test_with_exact_the_mean_stays_near_what_the_server_holds():
    federated = strategy(aggregation=Exact(rank=3, max_rank=3, seed=0), download="int8")
    held = random_adapter(3, 0, scale=0.3, sites={name: (site.inputs, site.outputs) for name, site in SITES.items()})
    held = Exact(rank=3, max_rank=3, seed=0).aggregate(held, [(held, 1.0)], round=1).adapter
    found, (read, _) = train(federated, held, 0.0, number=1)
    for site in SITES:
        wanted = held[site].b @ held[site].a
        off = (found[site].b @ found[site].a - wanted).norm()
        assert off < 0.2 * (read[f"{site}.lora_B"] @ read[f"{site}.lora_A"] - wanted).norm()


@precisions
def test_whatever_is_sent_is_sent_so(precision):
    devices = [FakeDevice("a")]
    federated, grid = strategy(download=precision), CohortGrid(devices, perform)
    arrays = records.adapter_to_record(encode(to_tensors(random_adapter(3, 0, sites=_sides()))))
    trains = list(federated.configure_train(1, arrays, ConfigRecord(), grid))
    measures = list(federated.configure_evaluate(1, arrays, ConfigRecord(), grid))
    asked = Personalize(
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
    personal = list(federated.configure_personalise(asked, grid))
    found = [
        records.request_from_records(message.metadata.message_type, message.content)
        for message in (*trains, *measures, *personal)
    ]
    assert len({request.adapter for request in found}) == 1
    assert {request.rounded for request in found} == {QuantizedFormat(precision=precision, rank=3)}
    assert federated._round.bytes_down == len(found[0].adapter)


def _sides():
    return {name: (site.inputs, site.outputs) for name, site in SITES.items()}


def test_what_travels_beside_is_whole():
    with pytest.raises(ValueError, match="download: what travels beside"):
        strategy(plan=replace(PLAN, optimiser="sgd", scaffold=True), aggregation=FedIT(), download="int8")
