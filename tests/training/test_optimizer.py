"""AdamW on rows, compared with a torch.optim.AdamW for each row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.optimizer import AdamW

RATES = [1e-3, 1e-3, 3e-2, 0.0, 5e-1]
SUBSETS = st.lists(st.lists(st.integers(0, 4), unique=True), max_size=8)


@given(steps=SUBSETS, dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99))
def test_rows_match_separate_optimizers(steps: list[list[int]], dtype: torch.dtype, seed: int) -> None:
    """Rows at different steps and learning rates, in any order, including none."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(5, 7, generator=generator, dtype=dtype)
    rows_optimizer = AdamW(start.clone())
    rows_optimizer.reset(range(5), RATES)
    parameters = [row.clone().requires_grad_() for row in start]
    references = [torch.optim.AdamW([p], lr=rate, weight_decay=0.0) for p, rate in zip(parameters, RATES, strict=True)]
    for rows in steps:
        gradients = torch.randn(len(rows), 7, generator=generator, dtype=dtype) * 10.0 ** torch.arange(-3, 4)
        rows_optimizer.step(rows, gradients)
        for row, gradient in zip(rows, gradients, strict=True):
            parameters[row].grad = gradient.clone()
            references[row].step()
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    for row, parameter in zip(rows_optimizer.rows, parameters, strict=True):
        torch.testing.assert_close(row, parameter.detach(), **close)


def test_reset_clears_the_row() -> None:
    """Neither moments, nor steps, nor learning rate of the previous job are left."""
    torch.manual_seed(0)
    used, fresh = AdamW(torch.ones(2, 3)), AdamW(torch.ones(2, 3))
    used.reset([0, 1], [0.1, 0.2])
    for _ in range(5):
        used.step([0, 1], torch.randn(2, 3))
    kept = used.rows[0].clone()
    used.rows[1] = 1.0
    used.reset([1], [0.3])
    fresh.reset([1], [0.3])
    for gradient in torch.randn(3, 1, 3):
        used.step([1], gradient)
        fresh.step([1], gradient)
    assert torch.equal(used.rows[1], fresh.rows[1])
    assert torch.equal(used.rows[0], kept)
    before = used.rows[0].clone()
    used.step([0], torch.zeros(1, 3))
    assert not torch.equal(used.rows[0], before)  # the other row still has its moments


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_padding_stays_zero(scale: float) -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 6)
    padding = torch.tensor([[0, 0, 1, 0, 1, 1], [0] * 6, [1] * 6]).bool()
    rows[padding] = 0.0
    optimizer = AdamW(rows)
    optimizer.reset([0, 1, 2], [0.1, 0.1, 10.0])
    for _ in range(20):
        optimizer.step([0, 1, 2], (scale * torch.randn(3, 6)).masked_fill(padding, 0.0))
    assert (rows[padding] == 0).all()
    assert rows[~padding].isfinite().all()
    assert (rows[~padding] != 0).all()


def test_nothing_to_step() -> None:
    for rows, width in (([], 3), ([0, 1], 0)):
        optimizer = AdamW(torch.ones(2, width))
        optimizer.step(rows, torch.zeros(len(rows), width))
        assert (optimizer.rows == 1).all()
