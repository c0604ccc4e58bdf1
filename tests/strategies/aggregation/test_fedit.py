"""FedIT against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given

from common.errors import AntherError
from strategies.aggregation.fedit import FedIT
from tests.helpers.means import SITES, dense, distance, random_adapter, rounds, true_mean


@given(rounds(ranks=(4, 4)))
def test_factors_are_averaged_over_the_devices_of_a_site(round):
    current, updates = round
    result = FedIT().aggregate(current, updates, round=1)
    residuals = []
    for site in SITES:
        trained = [(adapter[site], weight) for adapter, weight in updates if site in adapter]
        if not trained:
            assert all(torch.equal(*pair) for pair in zip(result.adapter[site], current[site], strict=True))
            continue
        for part in (0, 1):
            expected = np.average(
                [f[part].double().numpy() for f, _ in trained], axis=0, weights=[p for _, p in trained]
            )
            assert np.allclose(result.adapter[site][part], expected, atol=1e-6)
        residuals.append(distance(dense(result.adapter, site), true_mean(current, updates, site)))
    assert result.diagnostics["residual"] == pytest.approx(np.mean(residuals or [0.0]), abs=1e-5)


def test_mixed_ranks_are_refused_with_advice():
    with pytest.raises(AntherError, match=r"got \[2, 4\]; use aggregation=exact"):
        FedIT().aggregate(random_adapter(4, 0), [(random_adapter(4, 1), 1.0), (random_adapter(2, 2), 1.0)], round=1)
