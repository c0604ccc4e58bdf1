"""Median and trimmed mean of entries, against numpy on dense products."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.robust import trimmed
from strategies.robust.trimmed import Median, TrimmedMean, combined
from tests.helpers.means import SITES, best, close, dense, random_adapter, rounds
from tests.strategies.robust.test_gram import change, trained, turned


def wanted(current, updates, site, cut):
    """W + the mean of what is left of each entry's sorted changes."""
    values = np.sort([change(current, adapter, site) for adapter, _ in updates if trained(adapter, site)], axis=0)
    n = len(values)
    return dense(current, site) + values[cut(n) : n - cut(n)].mean(0)


def whole(updates):
    return [(adapter, 1.0) for adapter, _ in updates]


@settings(max_examples=25, deadline=None)
@given(rounds(), st.booleans())
def test_they_are_numpys(round, is_median):
    current, updates = round
    rule = Median() if is_median else TrimmedMean(outliers=0.3)
    found = combined(rule, current, whole(updates), rank=None, seed=0)
    for site in SITES:
        there = [adapter for adapter, _ in updates if trained(adapter, site)]
        assert (site in found) == bool(there)
        if there:
            truth = wanted(current, updates, site, lambda n: min((n - 1) // 2, n if is_median else int(0.3 * n)))
            assert close(dense(found, site), truth)
            assert len(found[site].a) >= 4
    if is_median and all(trained(adapter, "x") for adapter, _ in updates):
        values = np.median([change(current, adapter, "x") for adapter, _ in updates], axis=0)
        assert close(dense(found, "x"), dense(current, "x") + values)


@settings(max_examples=20, deadline=None)
@given(rounds(), st.randoms(use_true_random=False))
def test_order_and_factors_are_nothing_to_them(round, shuffled):
    current, updates = round
    found = combined(Median(), current, whole(updates), rank=None, seed=0)
    shuffled.shuffle(updates)
    other = [(turned(adapter, number), 1.0) for number, (adapter, _) in enumerate(updates)]
    other = combined(Median(), current, other, rank=None, seed=0)
    assert other.keys() == found.keys()
    assert all(close(dense(other, site), dense(found, site)) for site in found)


def test_a_fifth_of_outliers_leaves_each_entry_among_the_others():
    current = random_adapter(4, 0)
    honest = [random_adapter(4, seed) for seed in range(1, 9)]
    attackers = [random_adapter(4, 20, scale=30.0), random_adapter(4, 21, scale=1e-3)]
    for rule in (Median(), TrimmedMean(outliers=0.2)):
        found = combined(rule, current, [(adapter, 1.0) for adapter in [*attackers, *honest]], rank=None, seed=0)
        for site in SITES:
            values = np.stack([dense(adapter, site) for adapter in honest])
            moved = dense(found, site)
            assert (values.min(0) - 1e-4 <= moved).all()
            assert (moved <= values.max(0) + 1e-4).all()


def test_no_more_directions_than_are_wanted_and_no_fewer_than_there_were():
    current, devices = random_adapter(4, 0), [(random_adapter(4, seed), 1.0) for seed in (1, 2, 3)]
    everything, few = (combined(Median(), current, devices, rank=rank, seed=0) for rank in (None, 5))
    for site in SITES:
        assert len(few[site].a) == 5
        assert close(dense(few, site), best(dense(everything, site), 5))
        assert few[site].a.dtype == torch.float32
    assert len(combined(Median(), current, devices, rank=2, seed=0)["x"].a) == 4
    same = [(random_adapter(2, 5), 1.0)] * 3
    assert all(len(factors.a) >= 4 for factors in combined(Median(), current, same, rank=4, seed=0).values())


def test_a_change_counts_as_far_as_it_is_told():
    current, adapter = random_adapter(4, 0), random_adapter(4, 1)
    found = combined(Median(), current, [(adapter, 0.25)], rank=None, seed=0)
    for site in SITES:
        assert close(dense(found, site), 0.75 * dense(current, site) + 0.25 * dense(adapter, site))


def test_rows_a_few_at_a_time_give_the_same_and_a_large_site_is_compressed(monkeypatch):
    sites = {"large": (300, 700)}
    current = random_adapter(2, 0, sites=sites)
    devices = [(random_adapter(2, seed, sites=sites), 1.0) for seed in (1, 1, 2)]
    adapter = combined(Median(), current, devices, rank=4, seed=0)
    assert close(dense(adapter, "large"), dense(devices[0][0], "large"))
    monkeypatch.setattr(trimmed, "_ENTRIES", 300 * 3 * 40)
    assert close(dense(combined(Median(), current, devices, rank=4, seed=1), "large"), dense(adapter, "large"))


def test_shares_are_checked():
    with pytest.raises(ValueError, match="must be 0 or more"):
        TrimmedMean(outliers=0.6)
