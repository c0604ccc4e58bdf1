"""Passes side by side: in order, really at once, and to the same result."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from models.base import Base
from tests.training.test_trainer import assert_close, job, private
from training import passes
from training.jobs import Trained
from training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ThreadPoolExecutor(3)
    monkeypatch.setattr(passes, "_cores", lambda: 3)
    monkeypatch.setattr(passes, "_pool", lambda: pool)


@pytest.mark.usefixtures("three_cores")
def test_passes_run_at_once_and_come_back_in_order() -> None:
    together = threading.Barrier(3, timeout=60)  # breaks unless three are under way

    def work(part: int) -> tuple[int, int]:
        together.wait()
        return part, torch.get_num_threads()

    before = torch.get_num_threads()
    found = list(passes.run_passes(CPU, work, range(6)))
    assert [part for part, _ in found] == list(range(6))
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("three_cores")
def test_every_core_gets_its_share() -> None:
    assert passes.pass_size(CPU, 90, 64) == 30
    assert passes.pass_size(CPU, 900, 64) == 64
    assert passes.pass_size(CPU, 1, 64) == 1
    assert passes.pass_size(CPU, 0, 64) == 1
    assert passes.pass_size(torch.device("cuda"), 90, 64) == 64


def test_many_cores_train_what_one_trains(base: Base, request: pytest.FixtureRequest) -> None:
    jobs = lambda: [job(base, "a", batch_size=5), private(base, "b"), job(base, "c", rank=3)]  # noqa: E731
    alone = train(base, jobs(), micro_batch=64, timesteps=2)
    request.getfixturevalue("three_cores")
    for found, wanted, plan in zip(train(base, jobs(), micro_batch=64, timesteps=2), alone, jobs(), strict=True):
        assert isinstance(wanted, Trained)
        assert_close(found, wanted.adapter, plan.start)
