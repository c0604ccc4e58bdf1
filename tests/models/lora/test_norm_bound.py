"""Compare norms of adapters with numpy, on explicit products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Factors
from models.lora.norm_bound import MAX_NORM, norm_violation, squared_norm


def factors(rank: int, inputs: int, outputs: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.floats(0.1, 20.0))
def test_bound_covers_factors_and_product(rank: int, inputs: int, outputs: int, seed: int, limit: float) -> None:
    a, b = factors(rank, inputs, outputs, seed)
    norms = [np.linalg.norm(m) for m in (a.double().numpy(), b.double().numpy(), (b.double() @ a.double()).numpy())]
    if abs(max(norms) - limit) > 1e-9:
        assert (norm_violation({"x": Factors(a, b)}, limit) is None) == (max(norms) <= limit)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_squared_norm(rank: int, inputs: int, outputs: int, seed: int) -> None:
    a, b = (factor.double() for factor in factors(rank, inputs, outputs, seed))
    assert float(squared_norm(a, b)) == pytest.approx(float(np.square((b @ a).numpy()).sum()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("numbers", [2**16, 2**22, 2**22 + 1])
def test_long_factors(numbers: int) -> None:
    """A float32 sum of many equal squares has the largest error."""
    for norm, limit in ((0.999, 1.0), (1.001, 1.0), (1.001, 2.0)):
        long = torch.full((1, numbers), norm / numbers**0.5)
        adapter = {"x": Factors(long, torch.full((1, 1), 0.5))}
        assert (norm_violation(adapter, limit) is None) == (norm <= limit)


def test_message_names_the_site() -> None:
    good = Factors(torch.ones(2, 3), torch.zeros(4, 2))
    assert norm_violation({"good": good}) is None
    assert norm_violation({}) is None
    assert norm_violation({"good": good, "bad": Factors(torch.ones(2, 3), torch.full((4, 2), 1e38))}) == (
        "bad: norm 2.83e+38 is over 100"
    )
    large = 9.0  # each factor is within the bound, their product is not
    product = Factors(torch.full((1, 100), large), torch.full((100, 1), large))
    assert large * 10 < MAX_NORM
    assert "norm 8.1e+03" in str(norm_violation({"x": product}))


def test_nan_exceeds_any_bound() -> None:
    nan, one = torch.tensor([[float("nan")]]), torch.ones(1, 1)
    for factors in (Factors(nan, one), Factors(one, nan), Factors(nan, nan)):
        assert (
            norm_violation({"good": Factors(one, one), "x": factors, "last": Factors(one, one)})
            == "x: norm nan is over 100"
        )
