"""SCAFFOLD through the real devices and the real strategy, against algorithm 1 written out in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors, adapter_shapes, from_tensors, init_adapter, to_tensors
from models.lora.lora_xs import zero_adapter
from models.lora.trainable import trained_tensors
from privacy.policy import Policy
from protocol import records
from protocol.messages import TrainingPlan
from protocol.tensor_codec import decode, encode
from simulations.grid.cohort import CohortGrid
from strategies.aggregation import Aggregation
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsb import FedSB
from strategies.aggregation.fedsvd import FedSVD
from strategies.aggregation.ffa import FFA
from strategies.aggregation.hetlora import HetLoRA
from strategies.aggregation.rolora import RoLoRA
from strategies.planning.plan import PlanLimits
from strategies.selection.everyone import Everyone
from strategies.selection.sample import Sample
from strategies.strategy import Federated
from tests.helpers.central import central_dp
from tests.helpers.devices import BASE, SITES, Performer, make_device
from training import jobs
from training.jobs import Result, TrainedAdapter

NAMES, STEPS, RATE = "abc", 5, 0.15
PLAN = TrainingPlan(
    run="run", round=0, base=BASE, rank=2, steps=STEPS, batch_size=4, learning_rate=RATE, optimiser="sgd", scaffold=True
)
START = {name: torch.zeros(shape) for name, shape in adapter_shapes(SITES, 2).items()}


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(START)])


def bowl(device: str) -> tuple[np.ndarray, np.ndarray]:
    """Each device's loss is ½ Σ h (w − w*)²: its curvature h and its best w*."""
    drawn = np.random.default_rng(derive_seed(device))
    return drawn.uniform(0.5, 2.5, flat(START).size), drawn.normal(0.0, 0.1, flat(START).size)


class Bowls(Performer):
    """Trains by the gradient of a device's own bowl, and the job's correction."""

    def _perform(self, job: jobs.Job) -> Result:
        if not isinstance(job, jobs.TrainJob):
            return super()._perform(job)
        assert (job.steps, job.optimizer) == (STEPS, "sgd")
        y = flat(to_tensors(job.start))
        added = flat(to_tensors(job.correction)) if job.correction else 0.0
        curvature, best = bowl(job.client)
        for _ in range(job.steps):
            y = y - job.learning_rate * (curvature * (y - best) + added)
        return TrainedAdapter(_adapter(y), 0.25, job.steps)


def _adapter(values: np.ndarray) -> Adapter:
    sizes = [START[name].numel() for name in sorted(START)]
    parts = torch.from_numpy(values).float().split(sizes)
    return from_tensors({name: part.view(START[name].shape) for name, part in zip(sorted(START), parts, strict=True)})


def federated(**changes: Any) -> Federated:
    settings: dict[str, Any] = {
        "plan": PLAN,
        "sites": SITES,
        "aggregation": FedIT(),
        "selection": Everyone(),
        "limits": PlanLimits(),
    }
    return Federated(**settings | changes)


class Fleet:
    """Devices that keep what they know between rounds."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        devices = [make_device(folder / name, name=name, policy=Policy()) for name in NAMES]
        self.grid, self.changes, self.bowls = CohortGrid(devices, Bowls()), changes, Bowls()
        self.strategy = federated(**changes)

    def round(self, number: int, x: np.ndarray) -> np.ndarray:
        arrays = records.adapter_to_record(encode(to_tensors(_adapter(x))))
        messages = self.strategy.configure_train(number, arrays, ConfigRecord(), self.grid)
        found, _ = self.strategy.aggregate_train(number, self.grid.send_and_receive(messages))
        assert found is not None
        return flat(decode(records.adapter_from_record(found), adapter_shapes(SITES, 2)))


def algorithm(asked: Sequence[Sequence[str]], devices: int = len(NAMES)) -> list[np.ndarray]:
    """Algorithm 1, option II, with a global rate of 1: x after each round."""
    x = c = np.zeros(flat(START).size)
    own = dict.fromkeys(NAMES, c)
    found = []
    for names in asked:
        moved, drifted = [], []
        for name in names:
            y = x
            curvature, best = bowl(name)
            for _ in range(STEPS):
                y = y - RATE * (curvature * (y - best) - own[name] + c)
            after = own[name] - c + (x - y) / (STEPS * RATE)
            moved.append(y - x)
            drifted.append(after - own[name])
            own = {**own, name: after}
        x, c = x + np.mean(moved, axis=0), c + np.sum(drifted, axis=0) / devices
        found.append(x)
    return found


@pytest.mark.parametrize("size", [None, 2])
def test_it_is_algorithm_1(tmp_path: Path, size: int | None) -> None:
    """With everybody and with samples; the server starts again in the middle, with its memory."""
    selection = Everyone() if size is None else Sample(size=size, seed=1)
    fleet, x, found = Fleet(tmp_path, selection=selection), flat(START), []
    asked = [sorted(selection.select(list(NAMES), draw=number)) for number in range(1, 7)]
    for number in range(1, 7):
        if number == 4:
            fleet.strategy, before = federated(selection=selection), fleet.strategy
            fleet.strategy.memory = before.memory
        x = fleet.round(number, x)
        found.append(x)
    for one, other in zip(found, algorithm(asked), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("told", [{"rank": 1}, {"sites": ("x",)}])
def test_who_does_not_train_all_of_it_is_not_of_it(tmp_path: Path, told: dict[str, Any]) -> None:
    """It is not asked, and the others' variates are divided by their number."""
    fleet, x, found = Fleet(tmp_path), flat(START), []
    last = fleet.grid._devices[len(NAMES)]
    fleet.grid._devices[len(NAMES)] = replace(last, report=replace(last.report, **told))
    for number in range(1, 4):
        x = fleet.round(number, x)
        found.append(x)
    for one, other in zip(found, algorithm([NAMES[:-1]] * 3, devices=2), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_it_gets_where_averages_of_drifting_devices_do_not(tmp_path: Path) -> None:
    curvatures, bests = zip(*map(bowl, NAMES), strict=True)
    best = np.average(bests, axis=0, weights=curvatures)
    plain = Fleet(tmp_path / "plain", plan=replace(PLAN, scaffold=False))
    corrected, x, y = Fleet(tmp_path / "corrected"), flat(START), flat(START)
    for number in range(1, 11):
        x, y = plain.round(number, x), corrected.round(number, y)
    assert np.abs(x - best).max() > 5e-3
    assert np.abs(y - best).max() < 5e-4


def test_a_round_that_is_done_again_starts_from_the_same_variate(tmp_path: Path) -> None:
    """The server forgot a round: its devices did not."""
    fleet = Fleet(tmp_path)
    x = fleet.round(1, flat(START))
    memory = fleet.strategy.memory
    once = fleet.round(2, x)
    fleet.strategy.memory = memory
    assert np.array_equal(fleet.round(2, x), once)


def test_rounded_updates_mean_the_same_to_both(tmp_path: Path) -> None:
    """Each c_i follows from what the server reads, so that c stays their mean."""
    fleet, x = Fleet(tmp_path, plan=replace(PLAN, update="int4", feedback=True)), flat(START)
    for number in range(1, 4):
        x = fleet.round(number, x)
    own = [fleet.grid._devices[node].store._storage for node in sorted(fleet.grid._devices)]
    variates = [_after(storage.read("variate.safetensors")) for storage in own]
    assert flat(fleet.strategy.memory["control"]) == pytest.approx(np.mean(variates, axis=0), abs=1e-6)


def _after(data: bytes | None) -> np.ndarray:
    from safetensors.torch import load

    assert data is not None
    return flat({name.removeprefix("after/"): part for name, part in load(data).items() if name.startswith("after/")})


class Noted(Performer):
    """Keeps what came of its jobs, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[tuple[jobs.TrainJob, TrainedAdapter]] = []

    def _perform(self, job: jobs.Job) -> Result:
        found = super()._perform(job)
        if isinstance(job, jobs.TrainJob) and isinstance(found, TrainedAdapter):
            self.trained.append((job, found))
        return found


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))).Q


@pytest.mark.parametrize("rule", [FFA(), FedSA(), FedSB()], ids=lambda rule: type(rule).__name__)
def test_of_an_adapter_that_is_trained_in_part_it_corrects_that_part(tmp_path: Path, rule: Aggregation) -> None:
    """After the first round c_i = (x − y_i) / (K η) of what travels, and c is their mean."""
    lora_xs_bases = None
    if rule.trains(1) == "cores":
        lora_xs_bases = {
            name: Factors(orthonormal(s.inputs, 2).T, orthonormal(s.outputs, 2)) for name, s in SITES.items()
        }
    noted, start = Noted(), zero_adapter(lora_xs_bases) if lora_xs_bases else init_adapter(SITES, 2, seed=0)
    devices = [make_device(tmp_path / name, name=name, policy=Policy()) for name in NAMES]
    grid, strategy = CohortGrid(devices, noted), federated(aggregation=rule, lora_xs_bases=lora_xs_bases)
    arrays = records.adapter_to_record(encode(to_tensors(start)))
    for number in (1, 2):
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        arrays = strategy.aggregate_train(number, grid.send_and_receive(messages))[0] or arrays
        assert strategy.trained is not None
        assert strategy.trained.dropped == {}
    first, second = noted.trained[: len(NAMES)], noted.trained[len(NAMES) :]

    def own(job: jobs.TrainJob, adapter: Adapter) -> np.ndarray:
        """What travels of it."""
        found = trained_tensors(adapter, rule.trains(1), job.lora_xs_bases)
        return np.concatenate([found[name].double().numpy().ravel() for name in sorted(found)])

    variates = {job.client: (own(job, job.start) - own(job, found.adapter)) / (STEPS * RATE) for job, found in first}
    common = np.mean(list(variates.values()), axis=0)
    assert len(second) == len(NAMES)
    for job, _ in second:
        assert job.correction is not None
        assert own(job, job.correction) == pytest.approx(common - variates[job.client], abs=1e-4)
        for name, (a, b) in job.correction.items():
            if rule.trains(1) != "cores":
                stays = b if rule.trains(1) == "split" else a
                assert not stays.any(), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"plan": replace(PLAN, optimiser="adamw")},
        {"aggregation": Exact(rank=2, max_rank=None, seed=0)},
        *({"aggregation": rule} for rule in (FedSVD(seed=0), HetLoRA(), RoLoRA())),
    ],
)
def test_where_it_means_nothing_it_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="scaffold: for plain SGD and a mean of factors"):
        federated(**wrong)


def test_every_device_trains_every_direction() -> None:
    for changes in (
        {"aggregation": FFA(), "limits": PlanLimits(metered_rank=1)},
        {"plan": replace(PLAN, sites=("x",))},
    ):
        with pytest.raises(ValueError, match="every device trains every site and direction"):
            federated(**changes)


def test_under_privacy_per_device_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not under privacy per device"):
        federated(central_dp=central_dp(tmp_path))
