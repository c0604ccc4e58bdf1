"""Median and trimmed mean of entries against numpy on dense products."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.robust import trimmed
from strategies.robust.trimmed import Median, TrimmedMean, combine_updates
from tests.helpers.means import SITES, best, close, dense, random_adapter, rounds
from tests.strategies.robust.test_gram import change, refactored, trained


def expected_product(current, updates, site, cut):
    """Compute W plus the trimmed mean of each entry's changes, `[out, in]`."""
    values = np.sort([change(current, adapter, site) for adapter, _ in updates if trained(adapter, site)], axis=0)
    n = len(values)
    return dense(current, site) + values[cut(n) : n - cut(n)].mean(0)


def unscaled(updates):
    return [(adapter, 1.0) for adapter, _ in updates]


@given(rounds(), st.booleans())
def test_results_match_numpy(round, is_median):
    current, updates = round
    rule = Median() if is_median else TrimmedMean(outlier_fraction=0.3)
    result = combine_updates(rule, current, unscaled(updates), rank=None, seed=0)
    for site in SITES:
        devices = [adapter for adapter, _ in updates if trained(adapter, site)]
        assert (site in result) == bool(devices)
        if devices:
            expected = expected_product(
                current, updates, site, lambda n: min((n - 1) // 2, n if is_median else int(0.3 * n))
            )
            assert close(dense(result, site), expected)
            assert len(result[site].a) >= 4
    if is_median and all(trained(adapter, "x") for adapter, _ in updates):
        values = np.median([change(current, adapter, "x") for adapter, _ in updates], axis=0)
        assert close(dense(result, "x"), dense(current, "x") + values)


@given(rounds(), st.randoms(use_true_random=False))
def test_order_and_factorization_do_not_matter(round, shuffled):
    current, updates = round
    result = combine_updates(Median(), current, unscaled(updates), rank=None, seed=0)
    shuffled.shuffle(updates)
    other = [(refactored(adapter, number), 1.0) for number, (adapter, _) in enumerate(updates)]
    other = combine_updates(Median(), current, other, rank=None, seed=0)
    assert other.keys() == result.keys()
    assert all(close(dense(other, site), dense(result, site)) for site in result)


def test_entries_stay_within_the_honest_range():
    current = random_adapter(4, 0)
    honest = [random_adapter(4, seed) for seed in range(1, 9)]
    attackers = [random_adapter(4, 20, scale=30.0), random_adapter(4, 21, scale=1e-3)]
    for rule in (Median(), TrimmedMean(outlier_fraction=0.2)):
        result = combine_updates(
            rule, current, [(adapter, 1.0) for adapter in [*attackers, *honest]], rank=None, seed=0
        )
        for site in SITES:
            values = np.stack([dense(adapter, site) for adapter in honest])
            moved = dense(result, site)
            assert (values.min(0) - 1e-4 <= moved).all()
            assert (moved <= values.max(0) + 1e-4).all()


def test_rank_is_limited_but_not_reduced():
    current, devices = random_adapter(4, 0), [(random_adapter(4, seed), 1.0) for seed in (1, 2, 3)]
    full, limited = (combine_updates(Median(), current, devices, rank=rank, seed=0) for rank in (None, 5))
    for site in SITES:
        assert len(limited[site].a) == 5
        assert close(dense(limited, site), best(dense(full, site), 5))
        assert limited[site].a.dtype == torch.float32
    assert len(combine_updates(Median(), current, devices, rank=2, seed=0)["x"].a) == 4
    equal = [(random_adapter(2, 5), 1.0)] * 3
    assert all(len(factors.a) >= 4 for factors in combine_updates(Median(), current, equal, rank=4, seed=0).values())


def test_changes_are_scaled():
    current, adapter = random_adapter(4, 0), random_adapter(4, 1)
    result = combine_updates(Median(), current, [(adapter, 0.25)], rank=None, seed=0)
    for site in SITES:
        assert close(dense(result, site), 0.75 * dense(current, site) + 0.25 * dense(adapter, site))


def test_blocks_of_rows_give_the_same_result(monkeypatch):
    sites = {"large": (300, 700)}
    current = random_adapter(2, 0, sites=sites)
    devices = [(random_adapter(2, seed, sites=sites), 1.0) for seed in (1, 1, 2)]
    adapter = combine_updates(Median(), current, devices, rank=4, seed=0)
    assert close(dense(adapter, "large"), dense(devices[0][0], "large"))
    monkeypatch.setattr(trimmed, "_ENTRIES", 300 * 3 * 40)
    assert close(dense(combine_updates(Median(), current, devices, rank=4, seed=1), "large"), dense(adapter, "large"))


def test_invalid_fraction_is_refused():
    with pytest.raises(ValueError, match="must be 0 or more"):
        TrimmedMean(outlier_fraction=0.6)
