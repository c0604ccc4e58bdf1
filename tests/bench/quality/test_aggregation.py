"""What `bench.quality.aggregation` compares is the same mean; the layers are those of the network."""

import pytest
import torch

from bench.quality.aggregation import LAYERS, best_approximation, dense_mean, exact, layer_factors
from bench.quality.updates import relative_errors
from models.lora.adapter import Factors


def test_both_ways_make_the_best_of_the_mean():
    factors = list(layer_factors(24, 18, [2, 4, 4], seed=0))
    mean = torch.stack([b.double() @ a.double() for a, b in factors]).mean(0)
    left, right = dense_mean(24, 18, factors, 4)
    wanted = best_approximation(mean, 4)
    assert torch.allclose((left @ right).double(), wanted, atol=1e-5)
    assert torch.allclose(exact(24, 18, factors, 4), wanted, atol=1e-5)


def test_the_layers_are_those_of_stable_diffusion():
    """Adapters of rank 8 have 1.594 million numbers there, as published."""
    assert sum(LAYERS.values()) == 128
    assert 8 * sum(count * (inputs + outputs) for (inputs, outputs), count in LAYERS.items()) == 1_594_368


def test_errors_of_one_cap_are_those_of_matrices():
    current = {"layer": Factors(torch.randn(4, 24), torch.randn(18, 4))}
    trained = list(layer_factors(24, 18, [2, 4, 4], seed=1))
    errors = relative_errors(current, [({"layer": factors}, 1.0) for factors in trained], cap=2)
    products = [b.double() @ a.double() for a, b in trained]
    products[0] += current["layer"].b[:, 2:].double() @ current["layer"].a[2:].double()  # what rank 2 left as it was
    mean = torch.stack(products).mean(0)
    sigma = torch.linalg.svdvals(mean)
    assert errors["best"] == pytest.approx(float(sigma[2:].norm() / sigma.norm()))
    assert errors["exact"] == pytest.approx(errors["best"], rel=1e-4)
    assert errors["fedit_padded"] > errors["best"]
