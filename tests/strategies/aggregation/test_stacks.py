"""Stacked updates equal single ones, from memory and from disk."""

import torch

from strategies.aggregation.fedit import FedIT
from strategies.aggregation.stacks import PART, SiteStack
from strategies.round.update_spool import UpdateSpool
from tests.helpers.means import SITES, random_adapter

COUNT = PART + 3


def check(stack, adapters, weights):
    parts = list(stack.parts())
    assert [len(part.a) for part in parts] == [PART, len(adapters) - PART]
    a, b = torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1)
    assert torch.equal(a, torch.stack([factors.a for factors in adapters]).double())
    assert torch.equal(b, torch.stack([factors.b for factors in adapters], dim=1).double())
    assert torch.equal(torch.cat([part.weights for part in parts]), torch.tensor(weights, dtype=torch.float64))


def test_updates_in_memory():
    adapters = [random_adapter(2, number) for number in range(COUNT)]
    weights = [1.0 + number for number in range(COUNT)]
    updates = [*zip(adapters, weights, strict=True), ({"y": random_adapter(2, 99)["y"]}, 5.0)]
    stack = SiteStack(updates, "x")
    assert (stack.ranks, stack.directions) == ([2], 2 * COUNT)
    check(stack, [adapter["x"] for adapter in adapters], [weight / sum(weights) for weight in weights])
    assert SiteStack([(random_adapter(3, 0), 1.0), (random_adapter(0, 1), 1.0)], "x").ranks == [3]


def test_updates_on_disk_are_sorted():
    adapters = [random_adapter(2, number) for number in range(COUNT)]
    with UpdateSpool() as spool:
        for number in reversed(range(COUNT)):
            spool.add((f"device {number:03}", 1), adapters[number])
        check(SiteStack(spool, "x"), [adapter["x"] for adapter in adapters], [1 / COUNT] * COUNT)
        on_disk = FedIT().aggregate(random_adapter(2, 99), spool, round=1)
        in_memory = FedIT().aggregate(random_adapter(2, 99), [(adapter, 1.0) for adapter in adapters], round=1)
    assert on_disk.diagnostics == in_memory.diagnostics
    for site in SITES:
        assert all(map(torch.equal, on_disk.adapter[site], in_memory.adapter[site]))


def test_empty_updates_of_rank_0():
    with UpdateSpool() as spool:
        spool.add(("a", 1), random_adapter(0, 0))
        assert SiteStack(spool, "x").ranks == []
        assert list(SiteStack(spool, "x").parts()) == []
