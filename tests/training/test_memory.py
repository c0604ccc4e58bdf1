"""Memory: exact counts for simple programs, and a budget that follows from the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from common.errors import AntherError
from common.units import GIB
from training import capacity

CPU = torch.device("cpu")
N = 1000
OUTSIDE = torch.ones(N)


def chain() -> None:
    a = torch.ones(N)
    for _ in range(5):
        a = a + 1  # the old tensor lives until the new one exists


def freed() -> None:
    a = torch.ones(N)
    del a
    b = torch.ones(2 * N)
    del b
    torch.ones(N)


def views() -> None:
    a = torch.ones(N)
    kept = [a.view(10, -1), a[3:], a.expand(7, N), a.reshape(-1), a.detach(), *a.split(100), a.unsqueeze(0).mT]
    assert len(kept) == 16


def view_keeps_storage() -> None:
    a = torch.ones(N)[:1]
    b = torch.ones(N)
    assert a.shape != b.shape


def in_place() -> None:
    a = torch.ones(N)
    a.add_(1).mul_(2)
    a[3:5] = 7
    torch.add(a, a, out=a)
    OUTSIDE.mul_(1)


def view_of_outside() -> None:
    kept = [OUTSIDE.view(-1), OUTSIDE[2:], OUTSIDE.detach()]
    assert len(kept) == 3


def two_results() -> None:
    values, indices = OUTSIDE.topk(N)  # int64
    assert len(values) == len(indices)


def backward() -> None:
    """y = exp(exp(x)) keeps both exponentials for the backward pass, where one gradient follows another."""
    x = OUTSIDE.clone().requires_grad_()  # 4N
    y = x.exp()  # 8N
    z = y.exp()  # 12N
    (grad,) = torch.autograd.grad(z, x, OUTSIDE)  # gradient of y: 16N, of x: 20N
    assert grad.shape == x.shape


PROGRAMS: list[tuple[Callable[[], object], int]] = [
    (lambda: None, 0),
    (lambda: torch.empty(N), 4 * N),
    (lambda: torch.empty(N, dtype=torch.float64), 8 * N),
    (lambda: torch.empty(0), 0),
    (chain, 8 * N),
    (freed, 8 * N),
    (views, 4 * N),
    (view_keeps_storage, 8 * N),
    (in_place, 4 * N),
    (view_of_outside, 0),
    (two_results, 12 * N),
    (backward, 20 * N),
]


@pytest.mark.parametrize(("work", "wanted"), PROGRAMS, ids=lambda x: getattr(x, "__name__", None))
def test_peak_bytes(work: Callable[[], object], wanted: int) -> None:
    assert capacity.peak_bytes(work) == wanted
    assert capacity.peak_bytes(work) == wanted  # nothing is left of previous measurements


def test_tensors_may_outlive_the_measurement() -> None:
    kept: list[Tensor] = []
    assert capacity.peak_bytes(lambda: kept.append(torch.ones(N))) == 4 * N
    kept.clear()
    assert capacity.peak_bytes(lambda: torch.ones(N)) == 4 * N


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Simulate a machine with this memory and these container limits."""

    def set_memory(total: float, available: float, **files: str) -> None:
        result = SimpleNamespace(total=int(total * GIB), available=int(available * GIB))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: result)
        monkeypatch.setattr(capacity, "Path", lambda _: tmp_path)
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(text)

    return set_memory


def test_budget_is_configured_or_a_fraction(machine: Callable[..., None]) -> None:
    machine(16, 1)  # free memory is not used
    assert capacity.budget(None, CPU) == 16 * GIB * capacity.DEFAULT_SHARE["cpu"]
    assert capacity.budget(3.5, CPU) == int(3.5 * GIB)
    assert 0 < capacity.DEFAULT_SHARE["cpu"] < capacity.DEFAULT_SHARE["cuda"] < 1


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        ({}, 16, 10),
        ({"max": "max\n"}, 16, 10),
        ({"max": f"{4 * GIB}\n"}, 4, 4),
        ({"max": f"{4 * GIB}\n", "current": f"{3 * GIB}\n"}, 4, 1),
        ({"max": f"{12 * GIB}\n", "current": f"{1 * GIB}\n"}, 12, 10),  # limited by the machine itself
        ({"max": f"{2**62}\n", "current": f"{3 * GIB}\n"}, 16, 10),
        ({"max": "", "current": ""}, 16, 10),
    ],
)
def test_container_limits_are_used(machine: Callable[..., None], files: dict[str, str], total: int, free: int) -> None:
    machine(16, 10, **files)
    assert capacity.budget(None, CPU) == total * GIB * capacity.DEFAULT_SHARE["cpu"]
    capacity.check_free(free * GIB, CPU)
    with pytest.raises(AntherError, match=rf"trainer\.memory_gib.* only {free} of {total} GiB are free"):
        capacity.check_free(free * GIB + 1, CPU)


def test_current_machine() -> None:
    assert 0 < capacity.budget(None, CPU) < psutil.virtual_memory().total
    capacity.check_free(1, CPU)
    with pytest.raises(AntherError, match=r"memory_gib=\d"):
        capacity.check_free(2**60, CPU)
