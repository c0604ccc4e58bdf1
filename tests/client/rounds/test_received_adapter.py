"""What a device takes for an adapter: whole or in few bits, to the byte, and no more of it than its owner allows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from client.device import Device
from client.rounds.handler import handle
from client.rounds.received_adapter import receive_adapter
from client.rounds.scheduler import run_handlers
from models.lora.adapter import Adapter, Factors, adapter_shapes, to_tensors
from models.lora.scaffold import to_control_tensors
from privacy.policy import Policy, RequestRefusedError
from protocol import quantization, tensor_codec
from protocol.messages import Evaluate, Personalize, QuantizedFormat, Reply, Request
from tests.helpers.devices import PRIVACY, SITES, Performer, adapter, make_device, to_bytes, train_request
from training import jobs

RANK = 3
TENSORS = to_tensors(adapter(RANK))
LARGE = {name: 1e3 * part for name, part in TENSORS.items()}


def few(precision: str = "int8", tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    return quantization.encode(tensors or TENSORS, precision, torch.Generator().manual_seed(0))


def same(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(a, b) for name in SITES for a, b in zip(one[name], other[name], strict=True))


def read(data: bytes, precision: str = "int8") -> Adapter:
    found = quantization.decode(data, adapter_shapes(SITES, RANK), precision)
    return {name: Factors(found[f"{name}.lora_A"], found[f"{name}.lora_B"]) for name in SITES}


@pytest.mark.parametrize("precision", quantization.PRECISIONS)
def test_few_bits_are_read_as_the_server_reads_them(tmp_path: Path, precision: str) -> None:
    data = few(precision)
    sent = receive_adapter(data, make_device(tmp_path), rounded=QuantizedFormat(precision=precision, rank=RANK))
    assert same(sent.adapter, read(data, precision))
    assert sent.rank == RANK


@pytest.mark.parametrize(
    ("data", "rounded", "complaint"),
    [
        (few(), QuantizedFormat(precision="int8", rank=0), "rank 0"),
        (few(), QuantizedFormat(precision="int8", rank=9), "rank 9"),
        (few(), QuantizedFormat(precision="int8", rank=2), ""),
        (few(), QuantizedFormat(precision="int4", rank=RANK), "bytes"),
        (few()[:-1], QuantizedFormat(precision="int8", rank=RANK), "bytes"),
        (few() + bytes(64), QuantizedFormat(precision="int8", rank=RANK), "bytes"),
        (b"", QuantizedFormat(precision="int8", rank=RANK), "bytes"),
        (to_bytes(adapter(RANK)), QuantizedFormat(precision="int8", rank=RANK), "bytes"),
        (few(), None, "header"),
        (few(tensors=LARGE), QuantizedFormat(precision="int8", rank=RANK), "norm"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, data: bytes, rounded: QuantizedFormat | None, complaint: str) -> None:
    device = make_device(tmp_path, policy=Policy(max_rank=8))
    with pytest.raises(RequestRefusedError, match=f"not one of rank 1 to 8 .*{complaint}"):
        receive_adapter(data, device, rounded=rounded)


@pytest.mark.parametrize("kind", ["with_bases", "controlled"])
def test_what_has_something_beside_it_is_whole(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RequestRefusedError, match="must not be quantized"):
        receive_adapter(
            few(), make_device(tmp_path), rounded=QuantizedFormat(precision="int8", rank=RANK), **{kind: True}
        )


def test_a_control_variate_is_as_strictly_read_as_an_adapter(tmp_path: Path) -> None:
    device, control = make_device(tmp_path), {name: part + 1 for name, part in TENSORS.items()}
    whole = tensor_codec.encode(TENSORS | to_control_tensors(control))
    sent = receive_adapter(whole, device, controlled="both")
    assert all(torch.equal(sent.control[name], part) for name, part in control.items())
    assert same(sent.adapter, adapter(RANK))
    for data, controlled in ((whole, None), (to_bytes(adapter(RANK)), "both")):
        with pytest.raises(RequestRefusedError, match=r"not expected|missing"):
            receive_adapter(data, device, controlled=controlled)
    infinite = {name: part * torch.inf for name, part in control.items()}
    with pytest.raises(RequestRefusedError, match="NaN or infinite"):
        receive_adapter(tensor_codec.encode(TENSORS | to_control_tensors(infinite)), device, controlled="both")


def ask(request: Request, device: Device, perform: Performer) -> Reply:
    reply = run_handlers({"d": handle(request, device)}, perform)["d"]
    if isinstance(reply, Exception):
        raise reply
    return reply


@pytest.mark.parametrize("private", [False, True])
def test_every_request_may_carry_few_bits(tmp_path: Path, private: bool) -> None:
    rounded, data = QuantizedFormat(precision="int8", rank=RANK), few()
    trains = dataclasses.replace(train_request(rank=RANK, private=private, sent=data), rounded=rounded)
    measures = Evaluate(run="run", round=1, adapter=data, rounded=rounded)
    personal = Personalize(
        run="run",
        round=1,
        adapter=data,
        rank=2,
        steps=1,
        batch_size=1,
        learning_rate=0.1,
        look_every=1,
        patience=1,
        rounded=rounded,
    )
    perform = Performer()
    for request in (trains, measures, personal):
        device = make_device(tmp_path / type(request).__name__, policy=Policy(delta=PRIVACY.delta))
        ask(request, device, perform)
    started, frozen = (job for job in perform.jobs if isinstance(job, jobs.TrainJob))
    assert same(started.start, read(data))
    assert frozen.frozen is not None
    assert same(frozen.frozen, read(data))
    measured = [job.adapter for job in perform.jobs if isinstance(job, jobs.MeasureJob) and job.adapter]
    assert any(same(found, read(data)) for found in measured)


def test_a_control_variate_is_of_plain_sgd_and_every_direction(tmp_path: Path) -> None:
    asked = train_request(rank=2, sent=tensor_codec.encode(TENSORS | to_control_tensors(TENSORS)))
    for plan in (
        dataclasses.replace(asked.plan, scaffold=True, optimiser="sgd"),  # of 3 directions 2
        dataclasses.replace(asked.plan, scaffold=True, rank=RANK),
        dataclasses.replace(asked.plan, scaffold=True, rank=RANK, optimiser="sgd", sites=tuple(SITES)[:1]),
    ):
        with pytest.raises(RequestRefusedError, match="needs the full rank, all sites and the optimizer sgd"):
            ask(dataclasses.replace(asked, plan=plan), make_device(tmp_path), Performer())
