"""Rounds in which a method of personalization takes part: refusals and uploads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from models.lora.adapter import Adapter, init_adapter
from models.lora.directions import divide
from models.lora.trainable import trained_shapes
from privacy.policy import Policy, RequestRefusedError
from protocol import tensor_codec
from protocol.messages import MethodOption, PersonalizationMethod, Train, TrainingPlan, Update
from tests.helpers.devices import SITES, Performer, make_device, to_bytes, train_request
from training import jobs
from training.jobs import Result, TrainedAdapter
from training.personalization.directions import LearnedDirections

NUMBER, RANK = 2, 1
METHOD = LearnedDirections(number=NUMBER)
COEFFICIENTS = torch.tensor([1.0, -1.0])


class Fitting(Performer):
    """Finds the same coefficients for everyone, and adds 1 to B in training."""

    def _perform(self, job: jobs.Job) -> Result:
        if isinstance(job, jobs.TrainJob):
            adapter = {n: f._replace(b=f.b + (0 if job.directions else 1)) for n, f in job.start.items()}
            return TrainedAdapter(adapter, 0.1, job.steps, coefficients=COEFFICIENTS if job.directions else None)
        return super()._perform(job)


def sent_adapter() -> Adapter:
    return METHOD.initial(init_adapter(SITES, RANK, 1), seed=2)


def request(
    name: str = "directions", *, private: bool = False, rank: int | None = None, number: float = NUMBER
) -> Train:
    rank = METHOD.message_rank(RANK) if rank is None else rank
    plain = train_request(rank=rank, private=private, sent=to_bytes(sent_adapter()))
    options = (MethodOption(name="number", value=number),) if name == "directions" else ()
    plan: TrainingPlan = dataclasses.replace(
        plain.plan, personalization=PersonalizationMethod(name=name, options=options)
    )
    return dataclasses.replace(plain, plan=plan)


def answer(sent: Train, folder: Path, policy: Policy | None = None) -> Update | Exception:
    outcome = run_handlers({"d": handle(sent, make_device(folder, policy=policy))}, Fitting())["d"]
    assert isinstance(outcome, Update | Exception)
    return outcome


def test_upload_has_changed_directions(tmp_path: Path) -> None:
    update = answer(request(), tmp_path)
    assert isinstance(update, Update)
    tensors = tensor_codec.decode(update.adapter, trained_shapes(SITES, METHOD.message_rank(RANK), "both"))
    before, directions = divide(sent_adapter(), NUMBER)
    for name in SITES:
        b = tensors[f"{name}.lora_B"]
        torch.testing.assert_close(b[:, :RANK], before[name].b + 1)
        for k, coefficient in enumerate(COEFFICIENTS):
            torch.testing.assert_close(b[:, RANK * (1 + k) :][:, :RANK], directions[name][k] + coefficient)
        assert not tensors[f"{name}.lora_A"][RANK:].any()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (request(private=True), "enter it without noise"),
        (request("unheard-of"), "nothing is registered"),
        (request(number=0.5), "must be a whole number"),
        (request(number=0.0), "number=0"),
        (request(number=5.0), "is none of this method"),
        (request(rank=2), "is none of this method"),
    ],
)
def test_refused_with_a_reason(tmp_path: Path, sent: Train, reason: str) -> None:
    error = answer(sent, tmp_path)
    assert isinstance(error, RequestRefusedError)
    assert reason in str(error)


def test_steps_of_the_method_count_for_the_policy(tmp_path: Path) -> None:
    """The plan has 5 steps, and 4 more on the coefficients."""
    assert isinstance(answer(request(), tmp_path / "enough", Policy(max_steps=9)), Update)
    assert isinstance(answer(request(), tmp_path / "too few", Policy(max_steps=8)), RequestRefusedError)


def test_steps_of_the_method_take_time_and_energy(tmp_path: Path) -> None:
    sent, device = request(), make_device(tmp_path)
    update = run_handlers({"d": handle(sent, device)}, Fitting())["d"]
    assert isinstance(update, Update)
    seconds = 9 * sent.plan.batch_size / device.report.examples_per_second
    assert update.seconds == pytest.approx(seconds)
    assert update.joules == pytest.approx(seconds * device.report.watts)
