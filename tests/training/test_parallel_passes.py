"""Parallel passes: ordered, concurrent, and with the same results."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from models.base.base import Base
from tests.helpers.reference_trainer import PLENTY, assert_close, job, memory_for, private, trained_adapter
from training import cohort, passes
from training.buffers import CohortBuffers
from training.cohort import train
from training.jobs import TrainJob
from training.passes import BuffersKey, Entries, gradients

CPU = torch.device("cpu")


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ThreadPoolExecutor(3)
    monkeypatch.setattr(passes, "_cores", lambda: 3)
    monkeypatch.setattr(passes, "_pool", lambda: pool)


@pytest.mark.usefixtures("three_cores")
def test_passes_are_concurrent_and_ordered() -> None:
    barrier = threading.Barrier(3, timeout=60)  # breaks unless three passes are concurrent

    def work(part: int) -> tuple[int, int]:
        barrier.wait()
        return part, torch.get_num_threads()

    before = torch.get_num_threads()
    result = list(passes.run_passes(CPU, work, range(6)))
    assert [part for part, _ in result] == list(range(6))
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("three_cores")
def test_pass_size_gives_every_core_its_share() -> None:
    assert passes.pass_size(CPU, 90, 64) == 30
    assert passes.pass_size(CPU, 900, 64) == 64
    assert passes.pass_size(CPU, 1, 64) == 1
    assert passes.pass_size(CPU, 0, 64) == 1
    assert passes.pass_size(torch.device("cuda"), 90, 64) == 64


@pytest.mark.integration
@pytest.mark.parametrize("entries", [4, None])
def test_cores_do_not_change_the_result(fine: Base, entries: int | None, request: pytest.FixtureRequest) -> None:
    """Also with one draw of a picture per pass."""
    jobs = lambda: [job(fine, "a", batch_size=5), private(fine, "b", draws=3), job(fine, "c", rank=3)]  # noqa: E731
    single = train(fine, jobs(), memory=PLENTY, timesteps=2)
    request.getfixturevalue("three_cores")
    memory = memory_for(fine, jobs(), entries) if entries else PLENTY
    for result, expected, plan in zip(train(fine, jobs(), memory=memory, timesteps=2), single, jobs(), strict=True):
        assert_close(result, trained_adapter(expected), plan.start, 1e-10)


@pytest.mark.integration
@pytest.mark.parametrize("entries", [1, 3, 40])
def test_passes_may_overwrite_earlier_results(fine: Base, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA graphs do: results must not be kept by reference."""

    def jobs() -> list[TrainJob]:
        return [private(fine, "units in pieces", draws=4, steps=2), job(fine, "plain", steps=2)]

    class Overwriting:
        def __init__(self, rows: CohortBuffers) -> None:
            self._rows = rows
            self._kept = (
                torch.empty(40, rows.layout.size, dtype=fine.full_precision),
                torch.empty(40, dtype=fine.full_precision),
            )

        def __call__(self, entries: Entries) -> tuple[torch.Tensor, ...]:
            result = gradients(fine, self._rows, entries)
            for kept, values in zip(self._kept, result, strict=True):
                kept.fill_(torch.nan)
                kept[: len(values)] = values
            return tuple(kept[: len(entries.rows)] for kept in self._kept)

    def buffers(base: Base, key: BuffersKey) -> tuple[CohortBuffers, Overwriting]:
        rows = CohortBuffers(base, key.spec, key.capacity)
        return rows, Overwriting(rows)

    monkeypatch.setattr(passes, "_cores", lambda: 1)
    expected = train(fine, jobs(), memory=PLENTY, timesteps=2)
    monkeypatch.setattr(cohort, "take_buffers", buffers)
    result = train(fine, jobs(), memory=memory_for(fine, jobs(), entries, residents=1), timesteps=2)
    fine.cache.clear()
    for got, want, plan in zip(result, expected, jobs(), strict=True):
        assert_close(got, trained_adapter(want), plan.start, 1e-10)


def test_denormals_are_flushed_only_within_context() -> None:
    tiny = torch.tensor(1e-39)
    with passes.without_denormals(CPU):
        assert (tiny * 0.5).item() == 0
    assert (tiny * 0.5).item() > 0
