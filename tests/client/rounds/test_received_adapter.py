"""Strict decoding of adapters, full-precision and quantized, within the policy's limits."""

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


def quantized(precision: str = "int8", tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    return quantization.encode(tensors or TENSORS, precision, torch.Generator().manual_seed(0))


def same(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(a, b) for name in SITES for a, b in zip(one[name], other[name], strict=True))


def read(data: bytes, precision: str = "int8") -> Adapter:
    decoded = quantization.decode(data, adapter_shapes(SITES, RANK), precision)
    return {name: Factors(decoded[f"{name}.lora_A"], decoded[f"{name}.lora_B"]) for name in SITES}


@pytest.mark.parametrize("precision", quantization.PRECISIONS)
def test_quantized_adapter_is_decoded_as_on_the_server(tmp_path: Path, precision: str) -> None:
    data = quantized(precision)
    sent = receive_adapter(data, make_device(tmp_path), rounded=QuantizedFormat(precision=precision, rank=RANK))
    assert same(sent.adapter, read(data, precision))
    assert sent.rank == RANK


@pytest.mark.parametrize(
    ("data", "rounded", "complaint"),
    [
        (quantized(), QuantizedFormat(precision="int8", rank=0), "rank 0"),
        (quantized(), QuantizedFormat(precision="int8", rank=9), "rank 9"),
        (quantized(), QuantizedFormat(precision="int8", rank=2), ""),
        (quantized(), QuantizedFormat(precision="int4", rank=RANK), "bytes"),
        (quantized()[:-1], QuantizedFormat(precision="int8", rank=RANK), "bytes"),
        (quantized() + bytes(64), QuantizedFormat(precision="int8", rank=RANK), "bytes"),
        (b"", QuantizedFormat(precision="int8", rank=RANK), "bytes"),
        (to_bytes(adapter(RANK)), QuantizedFormat(precision="int8", rank=RANK), "bytes"),
        (quantized(), None, "header"),
        (quantized(tensors=LARGE), QuantizedFormat(precision="int8", rank=RANK), "norm"),
    ],
)
def test_invalid_bytes_are_refused(
    tmp_path: Path, data: bytes, rounded: QuantizedFormat | None, complaint: str
) -> None:
    device = make_device(tmp_path, policy=Policy(max_rank=8))
    with pytest.raises(RequestRefusedError, match=f"not one of rank 1 to 8 .*{complaint}"):
        receive_adapter(data, device, rounded=rounded)


@pytest.mark.parametrize("kind", ["with_bases", "controlled"])
def test_extra_tensors_need_full_precision(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RequestRefusedError, match="must not be quantized"):
        receive_adapter(
            quantized(), make_device(tmp_path), rounded=QuantizedFormat(precision="int8", rank=RANK), **{kind: True}
        )


def test_control_variate_is_validated(tmp_path: Path) -> None:
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


def answer_request(request: Request, device: Device, perform: Performer) -> Reply:
    reply = run_handlers({"d": handle(request, device)}, perform)["d"]
    if isinstance(reply, Exception):
        raise reply
    return reply


@pytest.mark.parametrize("private", [False, True])
def test_every_request_may_be_quantized(tmp_path: Path, private: bool) -> None:
    rounded, data = QuantizedFormat(precision="int8", rank=RANK), quantized()
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
        answer_request(request, device, perform)
    started, frozen = (job for job in perform.jobs if isinstance(job, jobs.TrainJob))
    assert same(started.start, read(data))
    assert frozen.frozen is not None
    assert same(frozen.frozen, read(data))
    measured = [job.adapter for job in perform.jobs if isinstance(job, jobs.MeasureJob) and job.adapter]
    assert any(same(result, read(data)) for result in measured)


def test_control_variate_needs_sgd_and_full_rank(tmp_path: Path) -> None:
    requested = train_request(rank=2, sent=tensor_codec.encode(TENSORS | to_control_tensors(TENSORS)))
    for plan in (
        dataclasses.replace(requested.plan, scaffold=True, optimiser="sgd"),  # 2 of 3 directions
        dataclasses.replace(requested.plan, scaffold=True, rank=RANK),
        dataclasses.replace(requested.plan, scaffold=True, rank=RANK, optimiser="sgd", sites=tuple(SITES)[:1]),
    ):
        with pytest.raises(RequestRefusedError, match="needs the full rank, all sites and the optimizer sgd"):
            answer_request(dataclasses.replace(requested, plan=plan), make_device(tmp_path), Performer())
