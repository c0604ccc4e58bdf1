"""What all rules have in common."""

import pytest

from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from tests.strategies.means import random_adapter

RULES = {"fedit": FedIT(), "exact": Exact(rank=4, max_rank=None, seed=0)}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@rules
def test_nothing_and_nobody_are_refused(rule):
    with pytest.raises(ValueError, match="nothing to aggregate"):
        rule.aggregate(random_adapter(4, 0), [], round=1)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be over 0"):
            rule.aggregate(random_adapter(4, 0), [(random_adapter(4, 1), 1.0), (random_adapter(4, 2), weight)], round=1)
