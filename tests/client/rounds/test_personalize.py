"""Choice of the shared adapter under the personal one: it depends on the owner's pictures, and is never revealed."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from client.device import Device
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from client.store.store import IMPORTED, PersonalAdapter
from common.errors import AntherError
from conf.schemas import sampling
from models.lora.adapter import Adapter, Factors, rank
from privacy.policy import Policy, RequestRefusedError
from protocol.messages import (
    Evaluate,
    EvaluationPrivacy,
    MethodOption,
    PersonalizationMethod,
    Personalize,
    Request,
    to_json,
)
from tests.helpers.devices import PICTURES, SITES, Performer, adapter, make_device, to_bytes, train_request
from training import jobs
from training.jobs import OutOfMemory

RANK = 3
FIRST, SECOND, THIRD = (adapter(RANK, seed=seed) for seed in (1, 2, 3))
PRIVATE = EvaluationPrivacy(noise_multiplier=20.0, clip=0.2, pictures=3, delta=1e-3)


class Judging(Performer):
    """Measures the first adapter at 0.5, every other at `others`, and any personal adapter on top as `trained` says."""

    def __init__(self, others: float, trained: float = 0.0) -> None:
        super().__init__()
        self._others, self._trained = others, trained

    def _perform(self, job: jobs.Job) -> jobs.Result:
        if isinstance(job, jobs.MeasureJob) and job.adapter:
            if rank(job.adapter) > RANK:  # shared and personal adapter
                return self._trained
            return 0.5 if same(job.adapter, FIRST) else self._others
        return super()._perform(job)


def same(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(a, b) for name in SITES for a, b in zip(one[name], other[name], strict=True))


def sent(shared: Adapter, number: int) -> Personalize:
    return Personalize(
        run="run",
        round=number,
        adapter=to_bytes(shared),
        rank=2,
        steps=10,
        batch_size=4,
        learning_rate=1e-3,
        look_every=5,
        patience=3,
    )


def answer_request(request: Request, device: Device, perform: Performer) -> Any:
    outcome = run_handlers({"d": handle(request, device)}, perform)["d"]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def trains(perform: Performer) -> jobs.TrainJob:
    (result,) = (job for job in perform.jobs if isinstance(job, jobs.TrainJob))
    return result


def stored_adapters(device: Device) -> Adapter:
    stored = device.store.personal(SITES)
    assert stored is not None
    return stored.shared


def after_two(folder: Path, others: float) -> Device:
    """Return a device that received the first adapter and then the second."""
    device, perform = make_device(folder), Judging(others)
    answer_request(sent(FIRST, 1), device, perform)
    answer_request(sent(SECOND, 2), device, perform)
    return device


@pytest.mark.parametrize(("others", "expected"), [(0.4, SECOND), (0.5, SECOND), (0.6, FIRST), (math.nan, FIRST)])
def test_worse_adapter_does_not_replace_better(tmp_path: Path, others: float, expected: Adapter) -> None:
    device = after_two(tmp_path, others)
    assert same(stored_adapters(device), expected)
    perform = Judging(others)
    answer_request(sent(THIRD, 3), device, perform)
    train = trains(perform)
    assert train.frozen is not None
    assert same(train.frozen, FIRST if expected is FIRST else THIRD)


def compared(perform: Performer) -> list[jobs.MeasureJob]:
    """Return the measurements of all examples, without those of one for `client.rounds.effect`."""
    return [job for job in perform.jobs if isinstance(job, jobs.MeasureJob) and len(job.examples) > 1]


def test_choice_uses_own_validation_pictures(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Judging(0.6)
    answer_request(sent(FIRST, 1), device, perform)
    answer_request(sent(SECOND, 2), device, perform)
    assert [len(job.examples) for job in compared(perform)] == [len(PICTURES.validation)] * (2 + 4)


def test_choice_without_validation_pictures(tmp_path: Path) -> None:
    blind, perform = make_device(tmp_path, pictures=PICTURES._replace(validation=())), Judging(0.6)
    for number, shared in enumerate((FIRST, SECOND, THIRD), start=1):
        answer_request(sent(shared, number), blind, perform)
    assert same(stored_adapters(blind), FIRST)
    assert {len(job.examples) for job in compared(perform)} == {len(PICTURES.train)}


def test_adapter_of_another_base_is_not_compared(tmp_path: Path) -> None:
    device = after_two(tmp_path, 0.6)
    changed = dataclasses.replace(device, report=dataclasses.replace(device.report, base="c" * 64))
    perform = Judging(0.6)
    answer_request(sent(SECOND, 3), changed, perform)
    assert same(stored_adapters(changed), SECOND)
    measured = [job.adapter for job in compared(perform)]
    assert [rank(adapter) for adapter in measured if adapter] == [RANK + 2] * 2  # the trained adapter and its start
    changed.store.roll_back()
    assert same(stored_adapters(changed), FIRST)  # the other base's adapter, unchanged


def test_personal_adapter_continues_on_stored_shared_one(tmp_path: Path) -> None:
    device, perform = after_two(tmp_path, 0.6), Judging(0.6)
    before = device.store.personal(SITES)
    assert before is not None
    answer_request(sent(THIRD, 3), device, perform)
    train = trains(perform)
    assert same(train.start, before.adapter)


def test_roll_back_restores_both(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Judging(0.4)
    with pytest.raises(AntherError, match="no previous adapter"):
        device.store.roll_back()
    answer_request(sent(FIRST, 1), device, perform)
    first = device.store.personal(SITES)
    answer_request(sent(SECOND, 2), device, perform)
    assert same(stored_adapters(device), SECOND)
    device.store.roll_back()
    result = device.store.personal(SITES)
    assert result is not None
    assert first is not None
    assert same(result.shared, FIRST)
    assert same(result.adapter, first.adapter)
    assert result.request == first.request
    with pytest.raises(AntherError, match="no previous adapter"):
        device.store.roll_back()
    newest = device.store.personal_versions()[0]
    assert not newest.is_current
    device.store.roll_back(newest.created)
    assert same(stored_adapters(device), SECOND)


class Trains(Judging):
    """Training whose result has this B."""

    def __init__(self, b: float, loss: float) -> None:
        super().__init__(0.4, loss)
        self._b = b

    def _perform(self, job: jobs.Job) -> jobs.Result:
        if isinstance(job, jobs.TrainJob):
            trained = {name: Factors(f.a, torch.full_like(f.b, self._b)) for name, f in job.start.items()}
            return jobs.TrainedAdapter(trained, 0.1, job.steps)
        return super()._perform(job)


@pytest.mark.parametrize(
    ("b", "loss"), [(6.9e9, 0.1), (math.nan, 0.1), (math.inf, 0.1), (0.1, math.nan), (0.1, 0.9), (0.1, math.inf)]
)
def test_broken_or_worse_result_is_discarded(tmp_path: Path, b: float, loss: float) -> None:
    """Even in the first round: the initial adapter is stored then, which changes nothing of the shared one."""

    class Worse(Trains):
        def _perform(self, job: jobs.Job) -> jobs.Result:
            if isinstance(job, jobs.MeasureJob) and job.adapter and rank(job.adapter) > RANK:
                new = any((f.b[:, RANK:] == self._b).all() or f.b.isnan().any() for f in job.adapter.values())
                return self._trained if new else 0.3
            return super()._perform(job)

    device = make_device(tmp_path)
    answer_request(sent(FIRST, 1), device, Worse(b, loss))
    first = device.store.personal(SITES)
    assert first is not None
    assert not any(f.b.any() for f in first.adapter.values())
    answer_request(sent(FIRST, 2), device, Trains(0.01, 0.1))
    good = device.store.personal(SITES)
    assert good is not None
    assert all((f.b == 0.01).all() for f in good.adapter.values())
    before = device.store.personal_versions()
    answer_request(sent(FIRST, 3), device, Worse(b, loss))
    result = device.store.personal(SITES)
    assert result is not None
    assert same(result.adapter, good.adapter)
    assert device.store.personal_versions() == before
    repeated = Worse(b, loss)
    answer_request(sent(FIRST, 3), device, repeated)
    assert not repeated.jobs  # the round was answered


def test_early_stopping_checks_at_the_end(tmp_path: Path) -> None:
    perform = Judging(0.4)
    answer_request(dataclasses.replace(sent(FIRST, 1), steps=3, look_every=1000), make_device(tmp_path), perform)
    stopping = trains(perform).early_stopping
    assert stopping is not None
    assert stopping.every == 3


@pytest.mark.parametrize("promise", ["open", "cap", "round"])
def test_no_early_stopping_with_privacy(tmp_path: Path, promise: str) -> None:
    """With a budget set by the owner, and after a private round."""
    device, perform = make_device(tmp_path, policy=Policy(max_epsilon=4.0) if promise == "cap" else None), Judging(0.4)
    if promise == "round":
        answer_request(train_request(), device, Performer())
    answer_request(sent(FIRST, 1), device, perform)
    stopping = trains(perform).early_stopping
    assert stopping is not None
    assert stopping.patience == (3 if promise == "open" else 10)


def _raises(error: Exception) -> Any:
    def pictures() -> Any:
        raise error

    return pictures


FAILURES: dict[str, Any] = {
    "no pictures": lambda device: dataclasses.replace(device, pictures=_raises(AntherError("no such folder"))),
    "a bug": lambda device: dataclasses.replace(device, pictures=_raises(ValueError("struct.error"))),
    "a damaged adapter": lambda device: device.store._write("personal.safetensors", b"x") or device,
}


class Fails(Judging):
    """Raises `wrong` at one kind of job."""

    def __init__(self, kind: type, wrong: Exception) -> None:
        super().__init__(0.4)
        self._kind, self._wrong = kind, wrong

    def __call__(self, batch: list[jobs.Job]) -> list[jobs.Result | Exception]:
        return [self._wrong if isinstance(job, self._kind) else self._perform(job) for job in batch]


@pytest.mark.parametrize("wrong", [AntherError("training became not finite"), RuntimeError("no memory"), OutOfMemory()])
@pytest.mark.parametrize("kind", [jobs.EncodeJob, jobs.TrainJob, jobs.MeasureJob])
def test_failures_are_not_revealed(tmp_path: Path, kind: type, wrong: Exception, caplog: Any) -> None:
    """Failures appear only in the owner's log."""
    expected = answer_request(sent(FIRST, 1), make_device(tmp_path / "whole"), Judging(0.4))
    assert answer_request(sent(FIRST, 1), make_device(tmp_path / "broken"), Fails(kind, wrong)) == expected
    assert str(wrong) in caplog.text


@pytest.mark.parametrize("how", FAILURES)
def test_owner_errors_are_not_revealed(tmp_path: Path, how: str) -> None:
    expected = answer_request(sent(FIRST, 1), make_device(tmp_path / "whole"), Judging(0.4))
    assert answer_request(sent(FIRST, 1), FAILURES[how](make_device(tmp_path / "broken")), Judging(0.4)) == expected


def test_throttle_stop_is_reported(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    with pytest.raises(jobs.Cancelled):
        answer_request(sent(FIRST, 1), device, Fails(jobs.TrainJob, jobs.Cancelled("the device is in use")))
    answer_request(sent(FIRST, 1), device, Judging(0.4))
    assert same(stored_adapters(device), FIRST)


def test_repeated_crashes_are_not_revealed(tmp_path: Path) -> None:
    """The worker is killed at each training, as for lack of memory; the fourth request gets a reply without another
    attempt.
    """
    device = make_device(tmp_path)
    for _ in range(3):
        conversation = handle(sent(FIRST, 1), device)
        job = next(conversation)
        while not isinstance(job, jobs.TrainJob):
            job = conversation.send(Performer()([job])[0])
        number = device.store.number("personalise-tries", _identity(sent(FIRST, 1)))
        conversation.close()  # a killed process writes nothing more:
        assert number is not None
        device.store.save_number("personalise-tries", _identity(sent(FIRST, 1)), number)
    perform = Judging(0.4)
    assert answer_request(sent(FIRST, 1), device, perform).device == device.name
    assert not perform.jobs


def _identity(request: Personalize) -> str:
    return hashlib.sha256(to_json(request).encode() + request.adapter).hexdigest()


def test_choice_is_not_revealed(tmp_path: Path) -> None:
    """Devices that differ only in their choice send the same replies and costs, and do the same work."""
    keeps, takes = after_two(tmp_path / "keeps", 0.6), after_two(tmp_path / "takes", 0.4)
    back = after_two(tmp_path / "back", 0.4)
    back.store.roll_back()
    assert same(stored_adapters(keeps), FIRST)
    assert same(stored_adapters(takes), SECOND)
    evaluate = Evaluate(run="run", round=5, adapter=to_bytes(SECOND), privacy=PRIVATE)
    requests = [
        sent(SECOND, 3),
        sent(THIRD, 4),
        train_request(number=5, sent=to_bytes(SECOND)),
        evaluate,
        train_request(number=6, sent=to_bytes(THIRD)),
    ]
    done = []
    for device in (keeps, takes, back):
        observed: list[object] = []
        for request in requests:
            perform = Judging(0.6 if device is keeps else 0.4)
            reply = answer_request(request, device, perform)
            response = {name: value for name, value in vars(reply).items() if name not in ("adapter", "gain")}
            observed.append((response, [type(job) for job in perform.jobs]))
            shared = [job for job in perform.jobs if isinstance(job, jobs.TrainJob) and job.purpose == "shared"]
            observed += [_numbers(job) for job in shared]
        done.append(observed)
    assert done[0] == done[1] == done[2]


def _numbers(job: jobs.TrainJob) -> list[object]:
    """Return the content of a shared update."""
    assert job.frozen is not None
    tensors = [t for part in (job.start, job.frozen) for name in SITES for t in part[name]]
    return [job.steps, job.batch_size, job.names, *(t.tolist() for t in tensors)]


def test_previews_stay_on_the_device(tmp_path: Path) -> None:
    device, perform = dataclasses.replace(make_device(tmp_path), previews=1), Performer()
    reply = answer_request(sent(FIRST, 3), device, perform)
    (job,) = (job for job in perform.jobs if isinstance(job, jobs.GenerateJob))
    stored = device.store.personal(SITES)
    assert stored is not None
    assert same(job.adapters[0], stored.shared)
    assert same(job.adapters[1], stored.adapter)
    assert job.captions == [PICTURES.validation[0].caption]
    assert Image.open(tmp_path / "previews" / "round-000003.png").size == (6, 4)
    assert reply == answer_request(
        sent(FIRST, 3), make_device(tmp_path / "other"), Performer()
    )  # the reply doesn't depend on it


def test_failed_preview_keeps_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Blind(Performer):
        def _perform(self, job: jobs.Job) -> jobs.Result:
            if isinstance(job, jobs.GenerateJob):
                raise AntherError("no memory")
            return super()._perform(job)

        def __call__(self, batch: list[jobs.Job]) -> list[jobs.Result | Exception]:
            try:
                return [self._perform(job) for job in batch]
            except AntherError as error:
                return [error]

    device = dataclasses.replace(make_device(tmp_path), previews=2)
    answer_request(sent(FIRST, 3), device, Blind())
    assert same(stored_adapters(device), FIRST)
    assert "no preview of round-000003: no memory" in caplog.text
    assert not (tmp_path / "previews").exists()


def test_prior_costs_twice_the_work(tmp_path: Path) -> None:
    method = PersonalizationMethod(name="prior")
    plain = answer_request(sent(FIRST, 1), make_device(tmp_path / "a"), Judging(0.4))
    prior = answer_request(
        dataclasses.replace(sent(FIRST, 1), method=method), make_device(tmp_path / "b"), Judging(0.4)
    )
    assert prior.seconds == 2 * plain.seconds


def test_drawing_for_the_prior_is_within_the_owners_limit(tmp_path: Path) -> None:
    """20 steps of training, and those of drawing for each picture of a caption."""
    requested = dataclasses.replace(
        sent(FIRST, 1),
        method=PersonalizationMethod(name="prior", options=(MethodOption(name="pictures", value=5.0),)),
    )
    device = make_device(tmp_path, policy=Policy(max_steps=20 + 5 * sampling.STEPS - 1))
    with pytest.raises(RequestRefusedError, match=f"steps={20 + 5 * sampling.STEPS}"):
        answer_request(requested, device, Judging(0.4))


def test_training_starts_from_an_imported_adapter(tmp_path: Path) -> None:
    """Under another shared adapter too; of a larger rank its best approximation, of a smaller one the same product."""
    for imported_rank in (1, 2, 4):
        device, perform = make_device(tmp_path / str(imported_rank)), Judging(0.4)
        imported = adapter(imported_rank, seed=5)
        zero = {name: Factors(f.a[:1].clone(), torch.zeros_like(f.b[:, :1])) for name, f in imported.items()}
        device.store.save_personal(PersonalAdapter(imported, zero, device.report.base, f"{IMPORTED}1"))
        answer_request(sent(FIRST, 1), device, perform)
        start = trains(perform).start
        assert rank(start) == 2
        for name, (a, b) in imported.items():
            u, values, vh = torch.linalg.svd(b @ a)
            best = u[:, :2] * values[:2] @ vh[:2]
            torch.testing.assert_close(start[name].b @ start[name].a, best, rtol=1e-4, atol=1e-5)
        result = device.store.personal(SITES)
        assert result is not None
        assert not result.is_imported


def test_adapter_of_other_layers_becomes_a_version(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Judging(0.4)
    other, without = ({"down.to_q": adapter(2, seed=seed)["down.to_q"]} for seed in (1, 2))
    device.store.save_personal(PersonalAdapter(other, without, device.report.base, f"{IMPORTED}1"))
    answer_request(sent(FIRST, 1), device, perform)
    assert same(stored_adapters(device), FIRST)
    device.store.roll_back()
    assert device.store.personal_sites() == ("down.to_q",)


@pytest.mark.parametrize(
    ("b", "loss", "message"), [(0.0, 0.4, "zero at every layer"), (1.0, 0.4, "equals the output"), (1.0, 0.3, None)]
)
def test_training_without_effect_is_reported(
    b: float, loss: float, message: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answer_request(sent(SECOND, 1), make_device(tmp_path), Trains(b, loss))
    warnings = [record.getMessage() for record in caplog.records if "changes nothing" in record.getMessage()]
    assert len(warnings) == (message is not None)
    assert all(message in warning for warning in warnings if message)
