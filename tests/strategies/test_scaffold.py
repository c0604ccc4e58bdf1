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
from strategies.flower_strategy import FlowerStrategy
from strategies.planning.plan import PlanLimits
from strategies.selection.everyone import Everyone
from strategies.selection.sample import Sample
from tests.helpers.central import central_dp
from tests.helpers.devices import BASE, SITES, Performer, make_device
from tests.helpers.strategies import make_strategy
from training import jobs
from training.jobs import Result, TrainedAdapter

NAMES, STEPS, RATE = "abc", 5, 0.15
PLAN = TrainingPlan(
    run="run", round=0, base=BASE, rank=2, steps=STEPS, batch_size=4, learning_rate=RATE, optimiser="sgd", scaffold=True
)
START = {name: torch.zeros(shape) for name, shape in adapter_shapes(SITES, 2).items()}


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(START)])


def quadratic(device: str) -> tuple[np.ndarray, np.ndarray]:
    """Return curvature h and optimum w* of a device's loss ½ Σ h (w − w*)²."""
    rng = np.random.default_rng(derive_seed(device))
    return rng.uniform(0.5, 2.5, flat(START).size), rng.normal(0.0, 0.1, flat(START).size)


class QuadraticPerformer(Performer):
    """Train with the gradient of the device's quadratic loss and the correction of the job."""

    def _perform(self, job: jobs.Job) -> Result:
        if not isinstance(job, jobs.TrainJob):
            return super()._perform(job)
        assert (job.steps, job.optimizer) == (STEPS, "sgd")
        y = flat(to_tensors(job.start))
        added = flat(to_tensors(job.correction)) if job.correction else 0.0
        curvature, best = quadratic(job.client)
        for _ in range(job.steps):
            y = y - job.learning_rate * (curvature * (y - best) + added)
        return TrainedAdapter(_adapter(y), 0.25, job.steps)


def _adapter(values: np.ndarray) -> Adapter:
    sizes = [START[name].numel() for name in sorted(START)]
    parts = torch.from_numpy(values).float().split(sizes)
    return from_tensors({name: part.view(START[name].shape) for name, part in zip(sorted(START), parts, strict=True)})


def federated(**changes: Any) -> FlowerStrategy:
    settings: dict[str, Any] = {
        "plan": PLAN,
        "sites": SITES,
        "aggregation": FedIT(),
        "selection": Everyone(),
        "limits": PlanLimits(),
    }
    return make_strategy(**settings | changes)


class ScaffoldFleet:
    """Devices that keep their state between rounds."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        devices = [make_device(folder / name, name=name, policy=Policy()) for name in NAMES]
        self.grid, self.changes, self.performer = (
            CohortGrid(devices, QuadraticPerformer()),
            changes,
            QuadraticPerformer(),
        )
        self.strategy = federated(**changes)

    def round(self, number: int, x: np.ndarray) -> np.ndarray:
        arrays = records.adapter_to_record(encode(to_tensors(_adapter(x))))
        messages = self.strategy.configure_train(number, arrays, ConfigRecord(), self.grid)
        results, _ = self.strategy.aggregate_train(number, self.grid.send_and_receive(messages))
        assert results is not None
        return flat(decode(records.adapter_from_record(results), adapter_shapes(SITES, 2)))


def algorithm(selected: Sequence[Sequence[str]], devices: int = len(NAMES)) -> list[np.ndarray]:
    """Run algorithm 1, option II, with a global learning rate of 1; returns x after each round."""
    x = c = np.zeros(flat(START).size)
    variates = dict.fromkeys(NAMES, c)
    results = []
    for names in selected:
        moved, variate_changes = [], []
        for name in names:
            y = x
            curvature, best = quadratic(name)
            for _ in range(STEPS):
                y = y - RATE * (curvature * (y - best) - variates[name] + c)
            after = variates[name] - c + (x - y) / (STEPS * RATE)
            moved.append(y - x)
            variate_changes.append(after - variates[name])
            variates = {**variates, name: after}
        x, c = x + np.mean(moved, axis=0), c + np.sum(variate_changes, axis=0) / devices
        results.append(x)
    return results


@pytest.mark.parametrize("size", [None, 2])
def test_rounds_match_algorithm_1(tmp_path: Path, size: int | None) -> None:
    """With all devices and with samples; the server is restarted in the middle, with its state."""
    selection = Everyone() if size is None else Sample(size=size, seed=1)
    fleet, x, results = ScaffoldFleet(tmp_path, selection=selection), flat(START), []
    selected = [sorted(selection.select(list(NAMES), draw=number)) for number in range(1, 7)]
    for number in range(1, 7):
        if number == 4:
            fleet.strategy, before = federated(selection=selection), fleet.strategy
            fleet.strategy.memory = before.memory
        x = fleet.round(number, x)
        results.append(x)
    for one, other in zip(results, algorithm(selected), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("report", [{"rank": 1}, {"sites": ("x",)}])
def test_partial_devices_are_left_out(tmp_path: Path, report: dict[str, Any]) -> None:
    """The device is not asked, and the control variates of the others are divided by their number."""
    fleet, x, results = ScaffoldFleet(tmp_path), flat(START), []
    last = fleet.grid._devices[len(NAMES)]
    fleet.grid._devices[len(NAMES)] = replace(last, report=replace(last.report, **report))
    for number in range(1, 4):
        x = fleet.round(number, x)
        results.append(x)
    for one, other in zip(results, algorithm([NAMES[:-1]] * 3, devices=2), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_scaffold_corrects_drift(tmp_path: Path) -> None:
    curvatures, bests = zip(*map(quadratic, NAMES), strict=True)
    best = np.average(bests, axis=0, weights=curvatures)
    plain = ScaffoldFleet(tmp_path / "plain", plan=replace(PLAN, scaffold=False))
    corrected, x, y = ScaffoldFleet(tmp_path / "corrected"), flat(START), flat(START)
    for number in range(1, 11):
        x, y = plain.round(number, x), corrected.round(number, y)
    assert np.abs(x - best).max() > 5e-3
    assert np.abs(y - best).max() < 5e-4


def test_repeated_round_uses_the_same_variate(tmp_path: Path) -> None:
    """The server lost a round that its devices remember."""
    fleet = ScaffoldFleet(tmp_path)
    x = fleet.round(1, flat(START))
    state = fleet.strategy.memory
    first_result = fleet.round(2, x)
    fleet.strategy.memory = state
    assert np.array_equal(fleet.round(2, x), first_result)


def test_quantized_updates_keep_variates_consistent(tmp_path: Path) -> None:
    """Each c_i is computed from the decoded update, so that c stays their mean."""
    fleet, x = ScaffoldFleet(tmp_path, plan=replace(PLAN, update="int4", feedback=True)), flat(START)
    for number in range(1, 4):
        x = fleet.round(number, x)
    storages = [fleet.grid._devices[node].store._storage for node in sorted(fleet.grid._devices)]
    variates = [_after(storage.read("variate.safetensors")) for storage in storages]
    assert flat(fleet.strategy.memory["control"]) == pytest.approx(np.mean(variates, axis=0), abs=1e-6)


def _after(data: bytes | None) -> np.ndarray:
    from safetensors.torch import load

    assert data is not None
    return flat({name.removeprefix("after/"): part for name, part in load(data).items() if name.startswith("after/")})


class RecordingPerformer(Performer):
    """Performer that records the results of training jobs in order."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[tuple[jobs.TrainJob, TrainedAdapter]] = []

    def _perform(self, job: jobs.Job) -> Result:
        results = super()._perform(job)
        if isinstance(job, jobs.TrainJob) and isinstance(results, TrainedAdapter):
            self.trained.append((job, results))
        return results


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))).Q


@pytest.mark.parametrize("rule", [FFA(), FedSA(), FedSB()], ids=lambda rule: type(rule).__name__)
def test_only_the_trained_part_is_corrected(tmp_path: Path, rule: Aggregation) -> None:
    """After the first round, c_i = (x − y_i) / (K η) for the uploaded tensors, and c is their mean."""
    lora_xs_bases = None
    if rule.trains(1) == "cores":
        lora_xs_bases = {
            name: Factors(orthonormal(s.inputs, 2).T, orthonormal(s.outputs, 2)) for name, s in SITES.items()
        }
    performer, start = (
        RecordingPerformer(),
        zero_adapter(lora_xs_bases) if lora_xs_bases else init_adapter(SITES, 2, seed=0),
    )
    devices = [make_device(tmp_path / name, name=name, policy=Policy()) for name in NAMES]
    grid, strategy = CohortGrid(devices, performer), federated(aggregation=rule, lora_xs_bases=lora_xs_bases)
    arrays = records.adapter_to_record(encode(to_tensors(start)))
    for number in (1, 2):
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        arrays = strategy.aggregate_train(number, grid.send_and_receive(messages))[0] or arrays
        assert strategy.trained is not None
        assert strategy.trained.dropped == {}
    first, second = performer.trained[: len(NAMES)], performer.trained[len(NAMES) :]

    def vectorize(job: jobs.TrainJob, adapter: Adapter) -> np.ndarray:
        """Flatten the uploaded tensors."""
        results = trained_tensors(adapter, rule.trains(1), job.lora_xs_bases)
        return np.concatenate([results[name].double().numpy().ravel() for name in sorted(results)])

    variates = {
        job.client: (vectorize(job, job.start) - vectorize(job, results.adapter)) / (STEPS * RATE)
        for job, results in first
    }
    common = np.mean(list(variates.values()), axis=0)
    assert len(second) == len(NAMES)
    for job, _ in second:
        assert job.correction is not None
        assert vectorize(job, job.correction) == pytest.approx(common - variates[job.client], abs=1e-4)
        for name, (a, b) in job.correction.items():
            if rule.trains(1) != "cores":
                fixed_factor = b if rule.trains(1) == "split" else a
                assert not fixed_factor.any(), name


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"plan": replace(PLAN, optimiser="adamw")}, "only with plain SGD"),
        *(
            ({"aggregation": rule}, "rotates or replaces the factors")
            for rule in (Exact(rank=2, max_rank=None, seed=0), FedSVD(seed=0), RoLoRA())
        ),
        ({"aggregation": HetLoRA()}, "a plain mean, and hetlora is not"),
    ],
)
def test_incompatible_settings_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^drift_correction=scaffold: .*{reason}"):
        federated(**settings)


def test_partial_training_is_refused() -> None:
    for changes in (
        {"aggregation": FFA(), "limits": PlanLimits(metered_rank=1)},
        {"plan": replace(PLAN, sites=("x",))},
    ):
        with pytest.raises(ValueError, match=r"a control variate covers every (direction|site) that was sent"):
            federated(**changes)


def test_device_level_privacy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would depend on updates before they are noised"):
        federated(central_dp=central_dp(tmp_path))
