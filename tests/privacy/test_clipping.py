"""Clipping: the bound holds for every row there is, and one example moves a sum by no more than it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from privacy.clipping import BoundedSum, clip_rows, gaussian_sigma

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)
ROWS = arrays.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 6)), elements=FLOATS)
CLIPS = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 2.0, 1e30])


def norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.double(), dim=-1)


@given(ROWS, CLIPS)
def test_every_row_is_finite_and_within_the_bound(rows: np.ndarray, clip: float) -> None:
    clipped = clip_rows(torch.from_numpy(rows), clip)
    assert clipped.values.shape == rows.shape
    assert clipped.values.dtype == torch.float32
    assert clipped.values.isfinite().all()
    assert (norms(clipped.values) <= clip * (1 + 1e-6)).all()


@given(ROWS, CLIPS)
def test_rows_keep_their_direction_and_short_ones_everything(rows: np.ndarray, clip: float) -> None:
    given_rows = torch.from_numpy(rows)
    for row, clipped in zip(given_rows, clip_rows(given_rows, clip).values, strict=True):
        norm = float(norms(row))
        if not math.isfinite(norm):
            assert clipped.eq(0).all()
        elif norm <= clip:
            assert torch.equal(clipped, row)
        else:  # the definition, in float64
            expected = row.double() * (clip / norm)
            assert torch.allclose(clipped.double(), expected, rtol=1e-6, atol=1e-44)


@given(ROWS.filter(lambda rows: len(rows) > 0), CLIPS, st.data())
def test_one_example_moves_the_sum_by_at_most_the_bound(rows: np.ndarray, clip: float, data: st.DataObject) -> None:
    removed = data.draw(st.integers(0, len(rows) - 1))
    all_rows = torch.from_numpy(rows)
    rest = torch.cat([all_rows[:removed], all_rows[removed + 1 :]])
    total = clip_rows(all_rows, clip).sum()
    moved = total.values.double() - clip_rows(rest, clip).sum().values.double()
    assert norms(moved) <= total.l2_bound * (1 + 1e-5)


def test_no_clip_changes_no_finite_row() -> None:
    rows = torch.tensor([[3e38, 3e38], [1e-40, 0.0], [math.nan, 1.0], [1.0, -math.inf]])
    clipped = clip_rows(rows, math.inf).values
    assert torch.equal(clipped[:2], rows[:2])
    assert clipped[2:].eq(0).all()


def test_an_empty_batch_still_has_a_sum_to_noise() -> None:
    total = clip_rows(torch.zeros(0, 3), 0.5).sum()
    assert total.values.tolist() == [0, 0, 0]
    assert gaussian_sigma(total, 2.0) == 1.0


def test_micro_batches_add_up_to_the_batch() -> None:
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    parts = clip_rows(rows[:3], 1.0).sum() + clip_rows(rows[3:], 1.0).sum()
    assert torch.allclose(parts.values, clip_rows(rows, 1.0).sum().values)
    assert parts.l2_bound == 1.0


def test_half_precision_rows_are_clipped_in_float32() -> None:
    rows = torch.full((2, 100_000), 100.0, dtype=torch.bfloat16)
    assert torch.allclose(norms(clip_rows(rows, 1.0).values), torch.ones(2, dtype=torch.float64), atol=1e-6)


def test_misuse_is_refused() -> None:
    for clip in (-1.0, math.nan):
        with pytest.raises(ValueError, match="clip"):
            clip_rows(torch.ones(1, 1), clip)
    with pytest.raises(ValueError, match="one bound"):
        clip_rows(torch.ones(1, 1), 1.0).sum() + clip_rows(torch.ones(1, 1), 2.0).sum()
    unbounded = BoundedSum(torch.ones(1), math.inf)
    with pytest.raises(ValueError, match="unbounded"):
        gaussian_sigma(unbounded, 1.0)
    assert gaussian_sigma(unbounded, 0.0) == 0
