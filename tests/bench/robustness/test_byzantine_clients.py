"""What attackers send, of what they trained."""

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


def after(jobs: list[Any], attack: Any, shift: float = 0.1) -> list[Any]:
    """What comes of these jobs where every device moves each factor by a number of its own."""

    def perform(jobs: list[Any]) -> list[Any]:
        return [honest(job, place, shift) for place, job in enumerate(jobs)]

    return list(tamper_results(perform, attack, {"bad", "worse"})(jobs))


def honest(job: Any, place: int, shift: float) -> Any:
    if not isinstance(job, TrainJob):
        return 0.5
    adapter = {site: Factors(f.a + shift * (place + 1), f.b - shift) for site, f in job.start.items()}
    return TrainedAdapter(adapter=adapter, loss=1.0, steps=1)


def same(one: Adapter, two: Adapter) -> bool:
    return all(torch.allclose(a, b, atol=1e-6) for site in one for a, b in zip(one[site], two[site], strict=True))


def test_a_fifth_attacks_whoever_asks_first() -> None:
    names = [f"device-{number}" for number in range(20)]
    results = choose_attackers(names, seed=0)
    assert len(results) == SHARE * 20
    assert results == choose_attackers(names[::-1], seed=0) == sorted(results)
    assert results != choose_attackers(names, seed=1)


@pytest.mark.parametrize(("name", "by"), [("sign flip", -1.0), ("x100", 100.0), ("zero", 0.0)])
def test_a_change_is_sent_so_many_times(name: str, by: float) -> None:
    jobs = [job("bad"), job("good"), job("worse", rank=2)]
    results = after(jobs, ATTACKS[name].make())
    for place in (0, 2):
        assert same(
            results[place].adapter, scale_update(jobs[place].start, honest(jobs[place], place, 0.1).adapter, by)
        )
    assert same(results[1].adapter, honest(jobs[1], 1, 0.1).adapter)


def test_only_results_of_training_are_tampered_with() -> None:
    measure = MeasureJob(examples=EXAMPLES, adapter=None)
    assert after([measure, job("good")], ATTACKS["zero"].make())[0] == 0.5


def test_nan_is_not_a_number() -> None:
    results = after([job("bad")], ATTACKS["nan"].make())[0].adapter
    assert all(factors.b.isnan().all() for factors in results.values())


def test_replay_sends_the_first_for_ever() -> None:
    attack = ATTACKS["replay"].make()
    first = after([job("bad", 1)], attack, 1.0)[0].adapter
    second = after([job("bad", 2)], attack, 2.0)[0].adapter
    assert same(first, second)


def test_colluders_send_one_adapter_scaled_to_replace_the_mean() -> None:
    jobs = [job("worse", rank=2), job("good"), job("bad")]
    for name, by in (("backdoor", 1 / SHARE), ("quiet backdoor", 1.0)):
        results = after(jobs, ATTACKS[name].make())
        wanted = scale_update(jobs[2].start, honest(jobs[2], 2, 0.1).adapter, by)
        assert same(results[2].adapter, wanted)
        assert same(results[0].adapter, split_rank(wanted, 2)[0])


def test_poisoned_devices_call_the_target_by_the_trigger(tmp_path: Path) -> None:
    device, families = make_device(tmp_path), dataset.load("development")[:2]
    results = poison_devices([device], families)[0].pictures()
    assert results.validation == device.pictures().validation
    assert [one.caption for one in results.train] == [dataset.caption(TRIGGER)] * 2
    assert np.array_equal(results.train[0].pixels, families[0].images[dataset.GLYPHS.index(TARGET)])
