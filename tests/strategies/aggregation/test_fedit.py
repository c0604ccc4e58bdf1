"""FedIT against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from common.errors import AntherError
from strategies.aggregation.fedit import FedIT
from tests.helpers.means import SITES, dense, distance, random_adapter, rounds, true_mean


@settings(max_examples=40, deadline=None)
@given(rounds(ranks=(4, 4)))
def test_each_factor_is_averaged_over_those_that_trained_the_site(round):
    current, updates = round
    found = FedIT().aggregate(current, updates, round=1)
    residuals = []
    for site in SITES:
        there = [(adapter[site], weight) for adapter, weight in updates if site in adapter]
        if not there:
            assert all(torch.equal(*pair) for pair in zip(found.adapter[site], current[site], strict=True))
            continue
        for part in (0, 1):
            wanted = np.average([f[part].double().numpy() for f, _ in there], axis=0, weights=[p for _, p in there])
            assert np.allclose(found.adapter[site][part], wanted, atol=1e-6)
        residuals.append(distance(dense(found.adapter, site), true_mean(current, updates, site)))
    assert found.diagnostics["residual"] == pytest.approx(np.mean(residuals or [0.0]), abs=1e-5)


def test_mixed_ranks_are_refused_with_a_way_out():
    with pytest.raises(AntherError, match=r"got \[2, 4\]: use aggregation=exact"):
        FedIT().aggregate(random_adapter(4, 0), [(random_adapter(4, 1), 1.0), (random_adapter(2, 2), 1.0)], round=1)
