"""Means of adapters, spelled out with dense float64 matrices."""

import numpy as np
import torch
from hypothesis import strategies as st

from models.lora.adapter import Factors

SITES = {"x": (12, 9), "y": (7, 15)}  # in, out


def random_adapter(size, seed, scale=1.0, sites=SITES):
    """Of rank `size` at these sites, in and out of each by its name."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator)

    return {site: Factors(draw(size, wide), draw(high, size)) for site, (wide, high) in sites.items()}


def in_reach(current, updates, trains):
    """The same updates, of devices that trained a part of the adapter alone."""
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
    """ΔW_k: what a device trained, and the directions that it left as they were."""
    size = len(adapter[site].a)
    rest = current[site].b[:, size:].double() @ current[site].a[size:].double()
    return dense(adapter, site) + rest.numpy()


def true_mean(current, updates, site):
    """Σ p_k ΔW_k / Σ p_k over those that trained the site; what it was if nobody did."""
    there = [(u, weight) for u, weight in updates if site in u and len(u[site].a)]
    if not there:
        return dense(current, site)
    return np.average([product(current, u, site) for u, _ in there], axis=0, weights=[weight for _, weight in there])


def best(matrix, size):
    """The best approximation of this rank (Eckart–Young)."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :size] * s[:size]) @ vh[:size]


def distance(found, wanted):
    """Relative, in the Frobenius norm."""
    return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30)


def close(found, wanted):
    return distance(found, wanted) <= 1e-5


@st.composite
def rounds(draw, *, ranks=(0, 4), equal=False, sites=SITES):
    """The current adapter of rank 4, and updates of these ranks and any weights, at any of the sites or none."""
    seed = draw(st.integers(0, 2**31))
    updates = []
    for number in range(draw(st.integers(1, 5))):
        size = ranks[1] if equal else draw(st.integers(*ranks))
        there = draw(st.sets(st.sampled_from(sorted(sites))))
        adapter = random_adapter(size, seed + 1 + number, sites={site: sites[site] for site in sorted(there)})
        updates.append((adapter, draw(st.floats(0.1, 10.0))))
    return random_adapter(4, seed, sites=sites), updates
