"""What goes up in few bits: what was trained, in the end; the same bytes whenever asked; and nothing twice."""

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
from tests.helpers.devices import PRIVACY, SITES, Performer, adapter, know_epsilon, make_device, to_bytes, train_request
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
    know_epsilon(4)


class Moved(Performer):
    """Moves what was sent by numbers of the round alone: what a round trains is known, and training can be repeated."""

    def __init__(self, scale: float = 0.01) -> None:
        super().__init__()
        self._scale = scale

    def _perform(self, job: jobs.Job) -> Result:
        if not isinstance(job, jobs.TrainJob):
            return super()._perform(job)
        moved = change(job.round, self._scale)
        return TrainedAdapter(
            {
                site: Factors(*(part + moved[f"{site}.lora_{name}"] for part, name in zip(pair, "AB", strict=True)))
                for site, pair in job.start.items()
            },
            0.25,
            job.steps,
        )


def change(number: int, scale: float = 0.01) -> Tensors:
    """What round `number` trains."""
    generator = torch.Generator().manual_seed(number)
    return {
        name: scale * torch.randn(shape, generator=generator) for name, shape in adapter_shapes(SITES, RANK).items()
    }


def request(number: int = 1, *, precision: str = "int4", private: bool = False, **changes: Any) -> Train:
    asked = train_request(number=number, rank=RANK, private=private)
    changes = {"update": precision, "feedback": True} | changes
    return dataclasses.replace(asked, plan=dataclasses.replace(asked.plan, **changes))


def ask(device: Device, asked: Train, perform: Performer | None = None) -> Update:
    reply = run_handlers({"d": handle(asked, device)}, perform or Moved())["d"]
    if isinstance(reply, Exception):
        raise reply
    assert isinstance(reply, Update)
    return reply


def read(reply: Update, precision: str = "int4", keep: float = 1.0) -> Tensors:
    """The change, as the server reads it."""
    return quantization.decode(reply.adapter, adapter_shapes(SITES, reply.rank), precision, keep=keep)


def total(*parts: Tensors) -> Tensors:
    return {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}


def near(one: Tensors, other: Tensors, *, atol: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=0, atol=atol) for k in one)


def left(device: Device) -> Tensors:
    """What is kept for the next round."""
    data = device.store._storage.read(RESIDUAL)
    assert data is not None
    return {name.removeprefix("left/"): part for name, part in load(data).items() if name.startswith("left/")}


@precisions
@promises
def test_the_change_comes_back_off_by_a_step_at_most(tmp_path: Path, precision: str, private: bool) -> None:
    reply = ask(make_device(tmp_path), request(precision=precision, private=private, feedback=False))
    steps = {"fp16": 2**-10, "int8": 1 / 127, "int4": 1 / 7}
    assert near(read(reply, precision), change(1), atol=1.01 * steps[precision] * max(map(_peak, change(1).values())))
    assert not (tmp_path / RESIDUAL).exists()


def _peak(tensor: Tensor) -> float:
    return float(tensor.abs().max())


@precisions
@promises
def test_nothing_is_lost_in_the_end(tmp_path: Path, precision: str, private: bool) -> None:
    """Error feedback: all that was sent and what is left are all that was trained."""
    device = make_device(tmp_path)
    keep = 0.5
    asked = [request(number, precision=precision, private=private, keep=keep) for number in (1, 2, 4)]  # 3: not asked
    read_so_far = [read(ask(device, each), precision, keep) for each in asked]
    assert near(total(*read_so_far, left(device)), total(change(1), change(2), change(4)))
    assert not near(total(*read_so_far), total(change(1), change(2), change(4)))


@promises
def test_the_same_request_gets_the_same_bytes_and_leaves_the_same(tmp_path: Path, private: bool) -> None:
    device = make_device(tmp_path)
    ask(device, request(1, private=private))
    first = ask(device, request(2, private=private))
    kept = left(device)
    again = ask(make_device(tmp_path), request(2, private=private))
    assert again == first
    assert near(left(device), kept, atol=0)
    third = ask(device, request(3, private=private))
    assert near(total(read(third), left(device)), total(change(3), kept))


def test_devices_and_rounds_toss_coins_of_their_own(tmp_path: Path) -> None:
    class Same(Moved):
        def _perform(self, job: jobs.Job) -> Result:
            return super()._perform(dataclasses.replace(job, round=1) if isinstance(job, jobs.TrainJob) else job)

    found = {
        (name, number): ask(
            make_device(tmp_path / f"{name}{number}", name=name), request(number, feedback=False), Same()
        ).adapter
        for name in "ab"
        for number in (1, 2)
    }
    assert len(set(found.values())) == 4


def test_a_refused_round_changes_nothing_of_what_is_left(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    ask(device, request(1))
    kept = left(device)
    strict = make_device(tmp_path, policy=Policy(delta=PRIVACY.delta, max_steps=1))
    with pytest.raises(RequestRefusedError, match="steps"):
        ask(strict, request(2))
    assert near(left(device), kept, atol=0)
    assert near(total(read(ask(device, request(3))), left(device)), total(change(3), kept))


def test_a_server_that_goes_back_is_sent_nothing_twice(tmp_path: Path) -> None:
    """What round 1 left went with round 2, and what round 2 left is of a round that the server has forgotten."""
    device = make_device(tmp_path)
    for number in (2, 4):
        ask(device, request(number))
    reply = ask(device, request(3))
    assert near(total(read(reply), left(device)), change(3))


@pytest.mark.parametrize("then", [{"run": "other"}, {"feedback": False}])
def test_only_rounds_of_one_run_follow_each_other(tmp_path: Path, then: dict[str, Any]) -> None:
    fresh = make_device(tmp_path / "fresh")
    device = make_device(tmp_path / "device")
    ask(device, request(1))
    assert ask(device, request(2, **then)).adapter == ask(fresh, request(2, **then)).adapter


@promises
def test_open_and_private_rounds_never_follow_each_other(tmp_path: Path, private: bool) -> None:
    """So nothing that an open one left enters a private one."""
    device = make_device(tmp_path)
    ask(device, request(1, private=private))
    with pytest.raises(RequestRefusedError, match="privacy"):
        ask(device, request(2, private=not private))


def test_what_an_open_round_left_enters_no_private_one_after_the_ledger_was_reset(tmp_path: Path) -> None:
    """By an owner; and if a reset left the file there, it would be for open rounds alone."""
    files = FileStorage(tmp_path)
    for put_back in (False, True):
        ask(make_device(tmp_path), request(1))
        kept = files.read(RESIDUAL)
        assert kept is not None
        reset(files, confirmed=True)
        assert files.read(RESIDUAL) is None
        if put_back:
            files.write(RESIDUAL, kept)
        device = make_device(tmp_path)
        ask(device, request(1, private=True, feedback=False))
        reply = ask(device, request(2, private=True))
        assert near(total(read(reply), left(device)), change(2))
        reset(files, confirmed=True)


def test_simulated_noise_leaves_nothing_to_a_release(tmp_path: Path) -> None:
    ask(
        make_device(tmp_path, noise=SimulatedNoise(seed=0, client="d", round=1, purpose="shared")),
        request(1, private=True),
    )
    reply = ask(make_device(tmp_path), request(2, private=True))
    assert near(total(read(reply), left(make_device(tmp_path))), change(2))


def test_another_rank_begins_anew(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    ask(device, request(1))
    reply = ask(device, request(2, rank=1), Performer())
    assert read(reply).keys() == change(2).keys()


def test_a_damaged_file_is_as_none(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    ask(device, request(1))
    (tmp_path / RESIDUAL).write_bytes(b"scrambled")
    assert near(total(read(ask(device, request(2))), left(device)), change(2))


@promises
def test_a_training_that_went_astray_is_refused_and_forgotten(tmp_path: Path, private: bool) -> None:
    device = make_device(tmp_path)
    astray = ask(device, request(1, private=private), Moved(scale=math.inf))
    with pytest.raises(CodecError, match="a scale"):
        read(astray)
    assert near(total(read(ask(device, request(2, private=private))), left(device)), change(2))


def test_cores_travel_as_their_change(tmp_path: Path) -> None:
    lora_xs_bases = random_bases(3)
    sent: Adapter = {name: Factors(a, left @ torch.full((3, 3), 0.1)) for name, (a, left) in lora_xs_bases.items()}
    asked = request(trains="cores", rank=2, precision="fp16")
    asked = dataclasses.replace(asked, adapter=tensor_codec.encode(to_tensors_with_bases(sent, lora_xs_bases)))

    class Cored(Performer):
        def _perform(self, job: jobs.Job) -> Result:
            if not isinstance(job, jobs.TrainJob):
                return super()._perform(job)
            assert job.lora_xs_bases
            return TrainedAdapter(
                {n: Factors(a, b + 0.5 * job.lora_xs_bases[n].b) for n, (a, b) in job.start.items()}, 0.25, 1
            )

    device = dataclasses.replace(make_device(tmp_path), sites=CORE_SITES)
    found = quantization.decode(ask(device, asked, Cored()).adapter, trained_shapes(CORE_SITES, 2, "cores"), "fp16")
    start, lora_xs_bases = split_rank(sent, 2)[0], split_rank(lora_xs_bases, 2)[0]
    wanted = trained_tensors(
        {n: Factors(a, 0.5 * lora_xs_bases[n].b) for n, (a, b) in start.items()}, "cores", lora_xs_bases
    )
    assert near(found, wanted, atol=1e-3)


class Killed(BaseException):
    """The power fails."""


def killed_at(call: int, work: Callable[[], None]) -> bool:
    """Do it, and die before the given durable step; False if it ended before."""
    made = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "fsync", "replace", "unlink"):
            durable = getattr(os, name)

            def counted(*args: Any, durable: Callable[..., Any] = durable, **kwargs: Any) -> Any:
                nonlocal made
                made += 1
                if made > call:
                    raise Killed
                return durable(*args, **kwargs)

            patch.setattr(os, name, counted)
        try:
            work()
        except Killed:
            return True
    return False


class Uneven(Moved):
    """What a private round trains differs each time, but by the same number everywhere: so it can be told."""

    def _perform(self, job: jobs.Job) -> Result:
        trained = super()._perform(job)
        if not isinstance(trained, TrainedAdapter):
            return trained
        drawn = torch.randn(())
        moved = {name: Factors(a + drawn, b + drawn) for name, (a, b) in trained.adapter.items()}
        return trained._replace(adapter=moved)


def even(tensors: Tensors) -> bool:
    """Whether it is one number everywhere."""
    numbers = torch.cat([part.flatten() for part in tensors.values()])
    return bool((numbers.max() - numbers.min()) < 1e-4)


def minus(one: Tensors, other: Tensors) -> Tensors:
    return {name: part - other[name] for name, part in one.items()}


def test_killed_at_every_step_nothing_is_sent_twice(tmp_path: Path) -> None:
    """Whatever was left belongs to the bytes that were sent, and enters the next round once or never."""
    replies: dict[int, Update] = {}

    def serve(folder: Path, rounds: int) -> None:
        device = make_device(folder)
        for number in range(1, rounds + 1):
            if number not in replies:
                replies[number] = ask(device, request(number, private=True), Uneven())

    seen = set()
    for call in range(1000):
        replies.clear()
        folder = tmp_path / str(call)
        if not killed_at(call, partial(serve, folder, 3)):
            break
        serve(folder, 4)  # the last of them whole
        device = make_device(folder)
        assert [entry.state for entry in device.store.ledger.entries()][-1] == SEALED
        came = [minus(read(replies[number]), change(number)) for number in range(1, 5)]
        # The rounds from one on lost nothing; what was left before it was forgotten.
        whole = [first for first in range(4) if even(total(*came[first:], left(device)))]
        assert len(whole) == 1, call
        seen.add(whole[0])
    assert call > 40
    assert seen == {0, 1, 2, 3}


def test_of_two_processes_what_the_one_left_that_replied_is_kept(tmp_path: Path) -> None:
    """The other's reply was never sent: what is left of it would be a second release of the round."""
    kept: list[Tensors] = []
    replies: list[Update] = []

    class Overtaken(Uneven):
        def _perform(self, job: jobs.Job) -> Result:
            if isinstance(job, jobs.TrainJob):
                other = make_device(tmp_path)
                replies.append(ask(other, request(1, private=True), Uneven()))
                kept.append(left(other))
            return super()._perform(job)

    assert ask(make_device(tmp_path), request(1, private=True), Overtaken()) == replies[0]
    assert near(left(make_device(tmp_path)), kept[0], atol=0)


def test_coins_are_of_the_devices_own_seed(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    reply = ask(device, request(5, feedback=False))
    coins = torch.Generator().manual_seed(derive_seed(device.seed, device.name, "run", 5, "rounding"))
    sent = to_tensors(split_rank(adapter(3), RANK)[0])
    trained = {name: sent[name] + moved for name, moved in change(5).items()}
    assert reply.adapter == quantization.encode(minus(trained, sent), "int4", coins)
    other = dataclasses.replace(make_device(tmp_path / "other"), seed=8)
    assert ask(other, request(5, feedback=False)).adapter != reply.adapter
    assert len(reply.adapter) < len(to_bytes(adapter(RANK))) / 3
