"""Tests that the benchmark compares equal means on the network's layers."""

import pytest
import torch

from bench.quality.aggregation import LAYERS, best_approximation, dense_mean, exact, layer_factors
from bench.quality.updates import relative_errors
from models.lora.adapter import Factors


def test_exact_and_dense_means_agree():
    factors = list(layer_factors(24, 18, [2, 4, 4], seed=0))
    mean = torch.stack([b.double() @ a.double() for a, b in factors]).mean(0)
    left, right = dense_mean(24, 18, factors, 4)
    expected = best_approximation(mean, 4)
    assert torch.allclose((left @ right).double(), expected, atol=1e-5)
    assert torch.allclose(exact(24, 18, factors, 4), expected, atol=1e-5)


def test_layers_match_stable_diffusion():
    """An adapter of rank 8 has 1.594 million numbers, as published."""
    assert sum(LAYERS.values()) == 128
    assert 8 * sum(count * (inputs + outputs) for (inputs, outputs), count in LAYERS.items()) == 1_594_368


def test_relative_errors_match_dense_matrices():
    current = {"layer": Factors(torch.randn(4, 24), torch.randn(18, 4))}
    trained = list(layer_factors(24, 18, [2, 4, 4], seed=1))
    errors = relative_errors(current, [({"layer": factors}, 1.0) for factors in trained], cap=2)
    products = [b.double() @ a.double() for a, b in trained]
    products[0] += (
        current["layer"].b[:, 2:].double() @ current["layer"].a[2:].double()
    )  # ranks that the device of rank 2 did not train
    mean = torch.stack(products).mean(0)
    sigma = torch.linalg.svdvals(mean)
    assert errors["best"] == pytest.approx(float(sigma[2:].norm() / sigma.norm()))
    assert errors["exact"] == pytest.approx(errors["best"], rel=1e-4)
    assert errors["fedit_padded"] > errors["best"]
