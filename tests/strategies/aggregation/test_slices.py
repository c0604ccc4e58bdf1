"""Means by slices of rank against singular value decompositions of dense matrices."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Factors, concatenate
from strategies.aggregation.exact import Exact
from tests.helpers.means import SITES, best, close, dense, random_adapter, rounds, true_mean


def aggregate(current, updates, **settings):
    return Exact(**{"rank": 4, "max_rank": None, "weighting": "rank_slice", "seed": 0} | settings).aggregate(
        current, updates, round=1
    )


def slice_mean(current, updates, site):
    """Compute the mean by the formula of `SliceMean`."""
    trained = [(adapter, weight) for adapter, weight in updates if site in adapter and len(adapter[site].a)]
    if not trained:
        return dense(current, site)
    largest = max(len(adapter[site].a) for adapter, _ in trained)
    total = current[site].b[:, largest:].double().numpy() @ current[site].a[largest:].double().numpy()
    for j in range(largest):
        owners = [(adapter, weight) for adapter, weight in trained if len(adapter[site].a) > j]
        for adapter, weight in owners:
            u, s, vh = np.linalg.svd(dense(adapter, site), full_matrices=False)
            total = total + weight / sum(w for _, w in owners) * s[j] * np.outer(u[:, j], vh[j])
    return total


@given(rounds())
def test_result_equals_the_formula(round):
    current, updates = round
    result = aggregate(current, updates)
    assert all(close(dense(result.adapter, site), slice_mean(current, updates, site)) for site in SITES)
    capped = aggregate(current, updates, max_rank=4)
    assert all(close(dense(capped.adapter, site), best(slice_mean(current, updates, site), 4)) for site in SITES)


@given(rounds(equal=True), st.integers(0, 2**31))
def test_equal_ranks_give_the_mean_of_products(round, seed):
    current, updates = round
    generator = torch.Generator().manual_seed(seed)
    m = torch.linalg.qr(torch.randn(4, 4, generator=generator).double()).Q * 2.0
    refactored = [
        (
            {
                s: Factors((torch.linalg.inv(m) @ f.a.double()).float(), (f.b.double() @ m).float())
                for s, f in u.items()
            },
            w,
        )
        for u, w in updates
    ]
    for devices in (updates, refactored):
        result = aggregate(current, devices)
        assert all(close(dense(result.adapter, site), true_mean(current, updates, site)) for site in SITES)


def test_agreeing_devices_keep_their_product():
    """All products have rank 2; devices of rank 4 add zeros. The plain mean would keep the old tail."""
    current, agreed = random_adapter(4, 0), random_adapter(2, 1)
    zeros = {site: Factors(a, torch.zeros_like(b)) for site, (a, b) in random_adapter(2, 2).items()}
    updates = [(agreed, 1.0), (concatenate([agreed, zeros]), 1.0)]
    result = aggregate(current, updates).adapter
    plain = aggregate(current, updates, weighting="device").adapter
    for site in SITES:
        assert close(dense(result, site), dense(agreed, site))
        assert not close(dense(plain, site), dense(agreed, site))


def test_high_ranks_do_not_fade():
    """One device of rank 4 among nine of rank 1: directions that only it trains keep their strength."""
    strong = {site: Factors(torch.eye(4, wide), 3.0 * torch.eye(high, 4)) for site, (wide, high) in SITES.items()}
    weak = {site: Factors(a[:1], b[:, :1]) for site, (a, b) in strong.items()}
    result = aggregate(strong, [(strong, 1.0), *[(weak, 1.0)] * 9]).adapter
    assert all(close(dense(result, site), dense(strong, site)) for site in SITES)
