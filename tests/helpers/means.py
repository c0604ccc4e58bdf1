"""Reference means of adapters with dense float64 matrices."""

import numpy as np
import torch
from hypothesis import strategies as st

from models.lora.adapter import Factors

SITES = {"x": (12, 9), "y": (7, 15)}  # in, out


def random_adapter(size, seed, scale=1.0, sites=SITES):
    """Make an adapter of rank `size` at these sites, given as (in, out) by name."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator)

    return {site: Factors(draw(size, wide), draw(high, size)) for site, (wide, high) in sites.items()}


def restricted_to(current, updates, trains):
    """Restrict updates to the part of the adapter that devices train."""
    if trains == "both":
        return updates

    def part(adapter):
        return {
            site: Factors(f.a, current[site].b[:, : len(f.a)])
            if trains in ("a", "split")
            else Factors(current[site].a[: len(f.a)], f.b)
            for site, f in adapter.items()
        }

    return [(part(adapter), weight) for adapter, weight in updates]


def dense(adapter, site):
    return adapter[site].b.double().numpy() @ adapter[site].a.double().numpy()


def product(current, adapter, site):
    """Compute ΔW_k: the trained directions and the unchanged ones, `[out, in]`."""
    size = len(adapter[site].a)
    rest = current[site].b[:, size:].double() @ current[site].a[size:].double()
    return dense(adapter, site) + rest.numpy()


def true_mean(current, updates, site):
    """Compute Σ p_k ΔW_k / Σ p_k over the devices that trained the site; the current product if none did."""
    trained = [(u, weight) for u, weight in updates if site in u and len(u[site].a)]
    if not trained:
        return dense(current, site)
    return np.average(
        [product(current, u, site) for u, _ in trained], axis=0, weights=[weight for _, weight in trained]
    )


def best(matrix, size):
    """Compute the best approximation of this rank (Eckart–Young)."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :size] * s[:size]) @ vh[:size]


def distance(result, expected):
    """Compute the relative distance in the Frobenius norm."""
    return np.linalg.norm(result - expected) / max(np.linalg.norm(expected), 1e-30)


def close(result, expected):
    return distance(result, expected) <= 1e-5


@st.composite
def rounds(draw, *, ranks=(0, 4), equal=False, sites=SITES):
    """Draw a current adapter of rank 4, and updates of these ranks with random weights, at a subset of the sites."""
    seed = draw(st.integers(0, 2**31))
    updates = []
    for number in range(draw(st.integers(1, 5))):
        size = ranks[1] if equal else draw(st.integers(*ranks))
        trained = draw(st.sets(st.sampled_from(sorted(sites))))
        adapter = random_adapter(size, seed + 1 + number, sites={site: sites[site] for site in sorted(trained)})
        updates.append((adapter, draw(st.floats(0.1, 10.0))))
    return random_adapter(4, seed, sites=sites), updates
