"""Quantized uploads: error feedback loses nothing, repeated requests give the same bytes, and nothing is sent twice."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from client.cli.ledger import reset
from client.device import Device
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from client.store.store import RESIDUAL
from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors, adapter_shapes, split_rank, to_tensors
from models.lora.lora_xs import to_tensors_with_bases
from models.lora.trainable import trained_shapes, trained_tensors
from privacy.ledger.ledger import SEALED
from privacy.noise import SimulatedNoise
from privacy.policy import Policy, RequestRefusedError
from privacy.storage import FileStorage
from protocol import quantization, tensor_codec
from protocol.messages import Train, Update
from protocol.tensor_codec import CodecError
from tests.helpers.devices import (
    PRIVACY,
    SITES,
    Performer,
    adapter,
    cache_epsilon,
    make_device,
    to_bytes,
    train_request,
)
from tests.models.lora.test_lora_xs import SITES as CORE_SITES
from tests.models.lora.test_lora_xs import random_bases
from training import jobs
from training.jobs import Result, TrainedAdapter

RANK = 2
precisions = pytest.mark.parametrize("precision", quantization.PRECISIONS)
promises = pytest.mark.parametrize("private", [False, True], ids=["open", "private"])

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def _epsilon_is_known() -> None:
    cache_epsilon(4)


class Moved(Performer):
    """Changes the received adapter by amounts that depend only on the round: training is known and repeatable."""

    def __init__(self, scale: float = 0.01) -> None:
        super().__init__()
        self._scale = scale

    def _perform(self, job: jobs.Job) -> Result:
        if not isinstance(job, jobs.TrainJob):
            return super()._perform(job)
        changed = change(job.round, self._scale)
        return TrainedAdapter(
            {
                site: Factors(*(part + changed[f"{site}.lora_{name}"] for part, name in zip(pair, "AB", strict=True)))
                for site, pair in job.start.items()
            },
            0.25,
            job.steps,
        )


def change(number: int, scale: float = 0.01) -> Tensors:
    """Return the change that round `number` trains."""
    generator = torch.Generator().manual_seed(number)
    return {
        name: scale * torch.randn(shape, generator=generator) for name, shape in adapter_shapes(SITES, RANK).items()
    }


def request(number: int = 1, *, precision: str = "int4", private: bool = False, **changes: Any) -> Train:
    requested = train_request(number=number, rank=RANK, private=private)
    changes = {"update": precision, "feedback": True} | changes
    return dataclasses.replace(requested, plan=dataclasses.replace(requested.plan, **changes))


def answer_request(device: Device, request_: Train, perform: Performer | None = None) -> Update:
    reply = run_handlers({"d": handle(request_, device)}, perform or Moved())["d"]
    if isinstance(reply, Exception):
        raise reply
    assert isinstance(reply, Update)
    return reply


def decoded(reply: Update, precision: str = "int4", keep: float = 1.0) -> Tensors:
    """Decode the change as the server does."""
    return quantization.decode(reply.adapter, adapter_shapes(SITES, reply.rank), precision, keep=keep)


def total(*parts: Tensors) -> Tensors:
    return {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}


def near(one: Tensors, other: Tensors, *, atol: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=0, atol=atol) for k in one)


def stored_residual(device: Device) -> Tensors:
    """Return the stored residual."""
    data = device.store._storage.read(RESIDUAL)
    assert data is not None
    return {name.removeprefix("left/"): part for name, part in load(data).items() if name.startswith("left/")}


@precisions
@promises
def test_quantization_error_is_at_most_a_step(tmp_path: Path, precision: str, private: bool) -> None:
    reply = answer_request(make_device(tmp_path), request(precision=precision, private=private, feedback=False))
    steps = {"fp16": 2**-10, "int8": 1 / 127, "int4": 1 / 7}
    assert near(
        decoded(reply, precision), change(1), atol=1.01 * steps[precision] * max(map(_peak, change(1).values()))
    )
    assert not (tmp_path / RESIDUAL).exists()


def _peak(tensor: Tensor) -> float:
    return float(tensor.abs().max())


@precisions
@promises
def test_error_feedback_loses_nothing(tmp_path: Path, precision: str, private: bool) -> None:
    """Error feedback: all uploads plus the residual equal everything trained."""
    device = make_device(tmp_path)
    keep = 0.5
    requested = [
        request(number, precision=precision, private=private, keep=keep) for number in (1, 2, 4)
    ]  # round 3 was not requested
    read_so_far = [decoded(answer_request(device, each), precision, keep) for each in requested]
    assert near(total(*read_so_far, stored_residual(device)), total(change(1), change(2), change(4)))
    assert not near(total(*read_so_far), total(change(1), change(2), change(4)))


@promises
def test_repeated_request_gives_same_bytes_and_residual(tmp_path: Path, private: bool) -> None:
    device = make_device(tmp_path)
    answer_request(device, request(1, private=private))
    first = answer_request(device, request(2, private=private))
    stored = stored_residual(device)
    repeated = answer_request(make_device(tmp_path), request(2, private=private))
    assert repeated == first
    assert near(stored_residual(device), stored, atol=0)
    third = answer_request(device, request(3, private=private))
    assert near(total(decoded(third), stored_residual(device)), total(change(3), stored))


def test_rounding_is_independent_across_devices_and_rounds(tmp_path: Path) -> None:
    class Same(Moved):
        def _perform(self, job: jobs.Job) -> Result:
            return super()._perform(dataclasses.replace(job, round=1) if isinstance(job, jobs.TrainJob) else job)

    response = {
        (name, number): answer_request(
            make_device(tmp_path / f"{name}{number}", name=name), request(number, feedback=False), Same()
        ).adapter
        for name in "ab"
        for number in (1, 2)
    }
    assert len(set(response.values())) == 4


def test_refused_round_keeps_residual(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer_request(device, request(1))
    stored = stored_residual(device)
    strict = make_device(tmp_path, policy=Policy(delta=PRIVACY.delta, max_steps=1))
    with pytest.raises(RequestRefusedError, match="steps"):
        answer_request(strict, request(2))
    assert near(stored_residual(device), stored, atol=0)
    assert near(total(decoded(answer_request(device, request(3))), stored_residual(device)), total(change(3), stored))


def test_rolled_back_server_gets_no_residual_twice(tmp_path: Path) -> None:
    """Round 1's residual was sent in round 2; round 2's residual belongs to a round that the server has forgotten."""
    device = make_device(tmp_path)
    for number in (2, 4):
        answer_request(device, request(number))
    reply = answer_request(device, request(3))
    assert near(total(decoded(reply), stored_residual(device)), change(3))


@pytest.mark.parametrize("then", [{"run": "other"}, {"feedback": False}])
def test_residual_belongs_to_one_run(tmp_path: Path, then: dict[str, Any]) -> None:
    fresh = make_device(tmp_path / "fresh")
    device = make_device(tmp_path / "device")
    answer_request(device, request(1))
    assert answer_request(device, request(2, **then)).adapter == answer_request(fresh, request(2, **then)).adapter


@promises
def test_residual_never_crosses_privacy_modes(tmp_path: Path, private: bool) -> None:
    """So no residual of a non-private round enters a private one."""
    device = make_device(tmp_path)
    answer_request(device, request(1, private=private))
    with pytest.raises(RequestRefusedError, match="privacy"):
        answer_request(device, request(2, private=not private))


def test_residual_never_enters_private_round_after_reset(tmp_path: Path) -> None:
    """After a reset by the owner; even if the reset left the file in place, it would only be used by non-private
    rounds.
    """
    files = FileStorage(tmp_path)
    for put_back in (False, True):
        answer_request(make_device(tmp_path), request(1))
        stored = files.read(RESIDUAL)
        assert stored is not None
        reset(files, confirmed=True)
        assert files.read(RESIDUAL) is None
        if put_back:
            files.write(RESIDUAL, stored)
        device = make_device(tmp_path)
        answer_request(device, request(1, private=True, feedback=False))
        reply = answer_request(device, request(2, private=True))
        assert near(total(decoded(reply), stored_residual(device)), change(2))
        reset(files, confirmed=True)


def test_simulated_residual_never_enters_release(tmp_path: Path) -> None:
    answer_request(
        make_device(tmp_path, noise=SimulatedNoise(seed=0, client="d", round=1, purpose="shared")),
        request(1, private=True),
    )
    reply = answer_request(make_device(tmp_path), request(2, private=True))
    assert near(total(decoded(reply), stored_residual(make_device(tmp_path))), change(2))


def test_new_rank_discards_residual(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer_request(device, request(1))
    reply = answer_request(device, request(2, rank=1), Performer())
    assert decoded(reply).keys() == change(2).keys()


def test_damaged_residual_is_ignored(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer_request(device, request(1))
    (tmp_path / RESIDUAL).write_bytes(b"scrambled")
    assert near(total(decoded(answer_request(device, request(2))), stored_residual(device)), change(2))


@promises
def test_non_finite_training_is_refused_and_discarded(tmp_path: Path, private: bool) -> None:
    device = make_device(tmp_path)
    astray = answer_request(device, request(1, private=private), Moved(scale=math.inf))
    with pytest.raises(CodecError, match="a scale"):
        decoded(astray)
    assert near(total(decoded(answer_request(device, request(2, private=private))), stored_residual(device)), change(2))


def test_cores_are_sent_as_change(tmp_path: Path) -> None:
    lora_xs_bases = random_bases(3)
    sent: Adapter = {
        name: Factors(a, stored_residual @ torch.full((3, 3), 0.1))
        for name, (a, stored_residual) in lora_xs_bases.items()
    }
    requested = request(trains="cores", rank=2, precision="fp16")
    requested = dataclasses.replace(requested, adapter=tensor_codec.encode(to_tensors_with_bases(sent, lora_xs_bases)))

    class Cored(Performer):
        def _perform(self, job: jobs.Job) -> Result:
            if not isinstance(job, jobs.TrainJob):
                return super()._perform(job)
            assert job.lora_xs_bases
            return TrainedAdapter(
                {n: Factors(a, b + 0.5 * job.lora_xs_bases[n].b) for n, (a, b) in job.start.items()}, 0.25, 1
            )

    device = dataclasses.replace(make_device(tmp_path), sites=CORE_SITES)
    response = quantization.decode(
        answer_request(device, requested, Cored()).adapter, trained_shapes(CORE_SITES, 2, "cores"), "fp16"
    )
    start, lora_xs_bases = split_rank(sent, 2)[0], split_rank(lora_xs_bases, 2)[0]
    expected = trained_tensors(
        {n: Factors(a, 0.5 * lora_xs_bases[n].b) for n, (a, b) in start.items()}, "cores", lora_xs_bases
    )
    assert near(response, expected, atol=1e-3)


class PowerFailure(BaseException):
    """Simulated loss of power."""


def killed_at(call: int, work: Callable[[], None]) -> bool:
    """Run, and die before the given durable step; return False if the work ended earlier."""
    created = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "fsync", "replace", "unlink"):
            durable = getattr(os, name)

            def counting(*args: Any, durable: Callable[..., Any] = durable, **kwargs: Any) -> Any:
                nonlocal created
                created += 1
                if created > call:
                    raise PowerFailure
                return durable(*args, **kwargs)

            patch.setattr(os, name, counting)
        try:
            work()
        except PowerFailure:
            return True
    return False


class RandomShift(Moved):
    """Shifts all factors by one random number per round, as private training would, to make rounds identifiable."""

    def _perform(self, job: jobs.Job) -> Result:
        trained = super()._perform(job)
        if not isinstance(trained, TrainedAdapter):
            return trained
        shift = torch.randn(())
        changed = {name: Factors(a + shift, b + shift) for name, (a, b) in trained.adapter.items()}
        return trained._replace(adapter=changed)


def is_uniform(tensors: Tensors) -> bool:
    """Return whether all entries are the same number."""
    numbers = torch.cat([part.flatten() for part in tensors.values()])
    return bool((numbers.max() - numbers.min()) < 1e-4)


def minus(one: Tensors, other: Tensors) -> Tensors:
    return {name: part - other[name] for name, part in one.items()}


@pytest.mark.integration
def test_kill_at_every_step_sends_nothing_twice(tmp_path: Path) -> None:
    """A residual belongs to the bytes that were sent, and enters the next round once or never."""
    replies: dict[int, Update] = {}

    def serve(folder: Path, rounds: int) -> None:
        device = make_device(folder)
        for number in range(1, rounds + 1):
            if number not in replies:
                replies[number] = answer_request(device, request(number, private=True), RandomShift())

    observed = set()
    for call in range(1000):
        replies.clear()
        folder = tmp_path / str(call)
        if not killed_at(call, partial(serve, folder, 3)):
            break
        serve(folder, 4)  # the last run isn't killed
        device = make_device(folder)
        assert [entry.state for entry in device.store.ledger.entries()][-1] == SEALED
        received = [minus(decoded(replies[number]), change(number)) for number in range(1, 5)]
        # From some round on nothing is lost; earlier residuals were discarded.
        whole = [first for first in range(4) if is_uniform(total(*received[first:], stored_residual(device)))]
        assert len(whole) == 1, call
        observed.add(whole[0])
    assert call > 40
    assert observed == {0, 1, 2, 3}


def test_residual_of_replying_process_is_kept(tmp_path: Path) -> None:
    """The other process's reply was never sent: its residual would be a second release of the round."""
    stored: list[Tensors] = []
    replies: list[Update] = []

    class Overtaken(RandomShift):
        def _perform(self, job: jobs.Job) -> Result:
            if isinstance(job, jobs.TrainJob):
                other = make_device(tmp_path)
                replies.append(answer_request(other, request(1, private=True), RandomShift()))
                stored.append(stored_residual(other))
            return super()._perform(job)

    assert answer_request(make_device(tmp_path), request(1, private=True), Overtaken()) == replies[0]
    assert near(stored_residual(make_device(tmp_path)), stored[0], atol=0)


def test_rounding_uses_the_device_seed(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    reply = answer_request(device, request(5, feedback=False))
    coins = torch.Generator().manual_seed(derive_seed(device.seed, device.name, "run", 5, "rounding"))
    sent = to_tensors(split_rank(adapter(3), RANK)[0])
    trained = {name: sent[name] + changed for name, changed in change(5).items()}
    assert reply.adapter == quantization.encode(minus(trained, sent), "int4", coins)
    other = dataclasses.replace(make_device(tmp_path / "other"), seed=8)
    assert answer_request(other, request(5, feedback=False)).adapter != reply.adapter
    assert len(reply.adapter) < len(to_bytes(adapter(RANK))) / 3
