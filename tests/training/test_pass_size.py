"""Fixed pass size of private jobs: public, cheap, and within the budget."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from models.base.base import Base
from tests.helpers.reference_trainer import private
from training import parallel_passes
from training.pass_size import batch_size_distribution, fixed_pass_size

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ENTRY = 6_440_459  # bytes, of the glyph base


@pytest.mark.parametrize(("assumed", "rate"), [(1, 1.0), (5, 0.6), (40, 0.1), (3000, 0.003)])
def test_batches_are_binomial(assumed: int, rate: float) -> None:
    counts, chances = batch_size_distribution(assumed, rate)
    expected = [math.comb(assumed, int(k)) * rate**k * (1 - rate) ** (assumed - k) for k in counts[:50].tolist()]
    assert chances[:50].tolist() == pytest.approx(expected, rel=1e-9)
    assert chances.sum() == pytest.approx(1, abs=1e-9)


def test_size_depends_on_the_plan_only(base: Base) -> None:
    """It is independent of the number of pictures."""
    sizes = {
        fixed_pass_size(CPU, [private(base, "a", 0.5, count=count, batch_size=4)], 64, ENTRY) for count in (0, 1, 5, 8)
    }
    assert len(sizes) == 1


@pytest.mark.parametrize("cores", [1, 2])
def test_sizes_are_whole_units_or_even_parts(base: Base, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_passes, "_cores", lambda: cores)
    for draws in (1, 3, 8):
        for most in (1, 2, 5, 30):
            size = fixed_pass_size(CPU, [private(base, "a", 0.5, draws=draws, batch_size=6)], most, ENTRY)
            assert 1 <= size <= most
            assert size % draws == 0 if draws <= most else size == math.ceil(draws / math.ceil(draws / most))


def test_full_sampling_needs_no_padding(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """If every picture joins, the passes of a step hold exactly these."""
    monkeypatch.setattr(parallel_passes, "_cores", lambda: 1)
    plan = private(base, "a", 1.0, draws=4, batch_size=20)
    for device, most in ((CPU, 64), (CUDA, 4096)):
        size = fixed_pass_size(device, [plan], most, ENTRY)
        assert math.ceil(80 / size) * size == 80


def test_expensive_passes_are_larger(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_passes, "_cores", lambda: 1)
    plan = private(base, "a", 0.2, draws=1, batch_size=4)
    assert fixed_pass_size(CPU, [plan], 64, ENTRY) < fixed_pass_size(CUDA, [plan], 64, ENTRY) <= 20
    many = [dataclasses.replace(plan, client=str(client)) for client in range(50)]
    assert fixed_pass_size(CPU, [plan], 64, ENTRY) < fixed_pass_size(CPU, many, 64, ENTRY)


def test_large_base_has_one_picture_per_pass(base: Base) -> None:
    """Without padding, a private step costs as much as a non-private one."""
    plan = private(base, "a", 0.2, draws=1, batch_size=4)
    assert fixed_pass_size(CPU, [plan], 64, 500 * ENTRY) == 1
