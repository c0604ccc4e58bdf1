"""What `bench.aggregation` compares is the same mean; the layers are those of the network."""

import torch

from bench.aggregation import LAYERS, dense, exact, layer, truncated


def test_both_ways_make_the_best_of_the_mean():
    factors = list(layer(24, 18, [2, 4, 4], seed=0))
    mean = torch.stack([b.double() @ a.double() for a, b in factors]).mean(0)
    left, right = dense(24, 18, factors, 4)
    wanted = truncated(mean, 4)
    assert torch.allclose((left @ right).double(), wanted, atol=1e-5)
    assert torch.allclose(exact(24, 18, factors, 4), wanted, atol=1e-5)


def test_the_layers_are_those_of_stable_diffusion():
    """Adapters of rank 8 have 1.594 million numbers there, as published."""
    assert sum(LAYERS.values()) == 128
    assert 8 * sum(count * (inputs + outputs) for (inputs, outputs), count in LAYERS.items()) == 1_594_368
