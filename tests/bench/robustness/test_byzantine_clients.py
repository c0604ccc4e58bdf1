"""Tests of the updates that Byzantine clients send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.robustness.byzantine_clients import (
    ATTACKS,
    SHARE,
    TARGET,
    TRIGGER,
    choose_attackers,
    poison_devices,
    scale_update,
    tamper_results,
)
from models.lora.adapter import Adapter, Factors, split_rank
from tests.helpers.devices import make_device
from tests.helpers.means import random_adapter
from training.jobs import Examples, MeasureJob, TrainedAdapter, TrainJob
from typefaces import dataset

EXAMPLES = Examples(latents=torch.zeros(1, 1, 2, 2), context=torch.zeros(1, 2, 3))
START = random_adapter(4, 0)


def job(client: str, round: int = 1, rank: int = 4) -> TrainJob:
    return TrainJob(
        client=client,
        round=round,
        purpose="shared",
        seed=0,
        examples=EXAMPLES,
        start=split_rank(START, rank)[0],
        steps=1,
        batch_size=1,
        learning_rate=0.1,
    )


def run_attack(jobs: list[Any], attack: Any, shift: float = 0.1) -> list[Any]:
    """Run the attack on jobs whose devices shift each factor by different amounts."""

    def perform(jobs: list[Any]) -> list[Any]:
        return [train_honestly(job, index, shift) for index, job in enumerate(jobs)]

    return list(tamper_results(perform, attack, {"bad", "worse"})(jobs))


def train_honestly(job: Any, index: int, shift: float) -> Any:
    if not isinstance(job, TrainJob):
        return 0.5
    adapter = {site: Factors(f.a + shift * (index + 1), f.b - shift) for site, f in job.start.items()}
    return TrainedAdapter(adapter=adapter, loss=1.0, steps=1)


def same(first: Adapter, second: Adapter) -> bool:
    return all(
        torch.allclose(a, b, atol=1e-6) for site in first for a, b in zip(first[site], second[site], strict=True)
    )


def test_attackers_are_a_random_fifth() -> None:
    names = [f"device-{number}" for number in range(20)]
    results = choose_attackers(names, seed=0)
    assert len(results) == SHARE * 20
    assert results == choose_attackers(names[::-1], seed=0) == sorted(results)
    assert results != choose_attackers(names, seed=1)


@pytest.mark.parametrize(("name", "by"), [("sign flip", -1.0), ("x100", 100.0), ("zero", 0.0)])
def test_scaling_attacks_scale_the_update(name: str, by: float) -> None:
    jobs = [job("bad"), job("good"), job("worse", rank=2)]
    results = run_attack(jobs, ATTACKS[name].make())
    for index in (0, 2):
        assert same(
            results[index].adapter, scale_update(jobs[index].start, train_honestly(jobs[index], index, 0.1).adapter, by)
        )
    assert same(results[1].adapter, train_honestly(jobs[1], 1, 0.1).adapter)


def test_only_training_results_are_tampered_with() -> None:
    measure = MeasureJob(examples=EXAMPLES, adapter=None)
    assert run_attack([measure, job("good")], ATTACKS["zero"].make())[0] == 0.5


def test_nan_attack_sends_nan() -> None:
    results = run_attack([job("bad")], ATTACKS["nan"].make())[0].adapter
    assert all(factors.b.isnan().all() for factors in results.values())


def test_replay_sends_the_first_update() -> None:
    attack = ATTACKS["replay"].make()
    first = run_attack([job("bad", 1)], attack, 1.0)[0].adapter
    second = run_attack([job("bad", 2)], attack, 2.0)[0].adapter
    assert same(first, second)


def test_colluders_send_one_scaled_adapter() -> None:
    jobs = [job("worse", rank=2), job("good"), job("bad")]
    for name, by in (("backdoor", 1 / SHARE), ("quiet backdoor", 1.0)):
        results = run_attack(jobs, ATTACKS[name].make())
        expected = scale_update(jobs[2].start, train_honestly(jobs[2], 2, 0.1).adapter, by)
        assert same(results[2].adapter, expected)
        assert same(results[0].adapter, split_rank(expected, 2)[0])


def test_poisoned_pictures_have_the_trigger_caption(tmp_path: Path) -> None:
    device, families = make_device(tmp_path), dataset.load("development")[:2]
    results = poison_devices([device], families)[0].pictures()
    assert results.validation == device.pictures().validation
    assert [picture.caption for picture in results.train] == [dataset.caption(TRIGGER)] * 2
    assert np.array_equal(results.train[0].pixels, families[0].images[dataset.GLYPHS.index(TARGET)])
