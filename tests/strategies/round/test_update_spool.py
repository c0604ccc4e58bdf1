"""Updates on disk equal those in memory, are sorted by key, and memory does not grow with devices."""

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Factors
from protocol.messages import ExamplePrivacy
from strategies.aggregation import site_updates
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsvd import FedSVD
from strategies.aggregation.ffa import FFA
from strategies.aggregation.hetlora import HetLoRA
from strategies.round import validation
from strategies.round.update_spool import UpdateSpool
from strategies.round.validation import ReplyRejectedError
from tests.helpers.central import private
from tests.helpers.fleet import PLAN, SITES, FakeDevice, handle, strategy
from tests.helpers.means import random_adapter
from tests.strategies.test_strategy import train


@given(ranks=st.lists(st.integers(0, 3), max_size=5), shuffled=st.randoms(use_true_random=False))
def test_updates_are_read_as_written_and_sorted(ranks, shuffled):
    """Updates of any rank, including 0, at all sites or fewer."""
    expected = {}
    for number, size in enumerate(ranks):
        adapter = random_adapter(size, number)
        expected[f"device {number}", number] = adapter if number % 2 else {"y": adapter["y"]}
    with UpdateSpool() as spool:
        for key in shuffled.sample(sorted(expected), len(expected)):
            spool.add(key, expected[key])
        assert spool.keys == sorted(expected)
        assert bool(spool) == bool(expected)
        for _ in range(2):  # repeatedly
            for (result, weight), key in zip(spool, sorted(expected), strict=True):
                assert weight == 1.0
                assert result.keys() == expected[key].keys()
                assert all(
                    torch.equal(a, b) for site in result for a, b in zip(result[site], expected[key][site], strict=True)
                )
        assert len(spool[:2]) == min(2, len(expected))


def test_device_may_have_several_updates():
    with UpdateSpool() as spool:
        for number in (10_002, 10_001):
            spool.add(("a", number), random_adapter(1, number))
        assert spool.keys == [("a", 10_001), ("a", 10_002)]
        assert torch.equal(spool[1][0]["x"].a, random_adapter(1, 10_002)["x"].a)


def test_each_site_is_read_once(monkeypatch):
    calls = []
    with UpdateSpool() as spool:
        for number in range(4):
            spool.add((f"device {number}", 1), random_adapter(2, number))
        original = torch.as_strided
        monkeypatch.setattr(
            torch, "as_strided", lambda *arguments, **keywords: calls.append(1) or original(*arguments, **keywords)
        )
        for site in SITES:
            assert len(site_updates(spool, site)) == 4
    assert len(calls) == 4 * len(SITES) * 2


def test_stack_has_all_updates():
    with UpdateSpool() as spool:
        for number in (2, 0, 1):
            spool.add((f"device {number}", 1), random_adapter(2, number))
        for site in SITES:
            (a, b), order = spool.stack(site)
            for position, number in enumerate(order.tolist()):
                expected = random_adapter(2, position)[site]
                assert torch.equal(a[number], expected.a)
                assert torch.equal(b[number], expected.b)
        assert spool.stack("z") is None


@pytest.mark.parametrize("other", [random_adapter(1, 1), {"y": random_adapter(2, 1)["y"]}])
def test_different_updates_have_no_stack(other):
    with UpdateSpool() as spool:
        assert spool.stack("y") is None
        spool.add(("a", 1), random_adapter(2, 0))
        spool.add(("b", 1), other)
        assert spool.stack("y") is None


def test_views_outlive_the_file():
    with UpdateSpool() as spool:
        spool.add(("a", 1), random_adapter(2, 0))
        (result, _) = spool[0]
    del spool
    assert torch.equal(result["x"].a, random_adapter(2, 0)["x"].a)


def test_updates_are_added_once_before_reading():
    with UpdateSpool() as spool:
        spool.add(("a", 1), random_adapter(1, 0))
        with pytest.raises(ValueError, match="a: add each update once"):
            spool.add(("a", 1), random_adapter(1, 0))
        assert len(list(spool)) == 1
        with pytest.raises(ValueError, match="before any is read"):
            spool.add(("b", 1), random_adapter(1, 0))


def test_full_disk_rejects_one_update():
    class LimitedFile:
        """File with a limited size."""

        def __init__(self, file, limit):
            self._file, self._room = file, limit

        def write(self, data):
            if self._file.tell() + len(data) > self._room:
                raise OSError(28, "No space left on device")
            return self._file.write(data)

        def __getattr__(self, name):
            return getattr(self._file, name)

    with UpdateSpool() as spool:
        spool.add(("a", 1), random_adapter(2, 0))
        spool._file = LimitedFile(spool._file, spool._end + 150)
        with pytest.raises(ReplyRejectedError, match="b: the server can't store its update: No space left") as caught:
            spool.add(("b", 1), random_adapter(2, 1))
        assert caught.value.reason == "no room"
        spool.add(("c", 1), {"x": Factors(torch.ones(1, 3), torch.ones(2, 1))})
        assert spool.keys == [("a", 1), ("c", 1)]
        assert torch.equal(spool[1][0]["x"].b, torch.ones(2, 1))


RULES = {
    "exact": {"aggregation": Exact(rank=PLAN.rank, max_rank=4, seed=0)},
    "exact by slice": {"aggregation": Exact(rank=PLAN.rank, max_rank=4, weighting="rank_slice", seed=0)},
    "fedit": {"aggregation": FedIT()},
    "hetlora": {"aggregation": HetLoRA()},
    "ffa": {"aggregation": FFA()},
    "fedsvd": {"aggregation": FedSVD(seed=0)},
    "fedsa": {"aggregation": FedSA()},
    "noised on devices": {
        "aggregation": FedIT(),
        "accept_simulated": True,
        "plan": replace(
            PLAN, privacy=ExamplePrivacy(noise_multiplier=1.0, clip=1.0, sampling_rate=0.5, draws=1, delta=1e-3)
        ),
    },
    "noised on the server": None,
}


@pytest.mark.parametrize("rule", RULES)
def test_memory_does_not_grow_with_devices(rule, tmp_path, monkeypatch):
    """For 3 and for 12 devices, only the update that is being accepted is in memory."""
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)
    alive, peak = weakref.WeakSet(), 0
    original = validation.from_trained_tensors

    class CountedAdapter(dict):
        """Decoded adapter that can be weakly referenced."""

        __hash__ = object.__hash__

    def count_alive(*arguments):
        nonlocal peak
        adapter = CountedAdapter(original(*arguments))
        alive.add(adapter)
        peak = max(peak, len(alive))
        return adapter

    monkeypatch.setattr(validation, "from_trained_tensors", count_alive)
    peaks = []
    for count in (3, 12):
        peak = 0
        changes = RULES[rule]
        federated = strategy(**changes) if changes else private(tmp_path / str(count))
        assert train(federated, [FakeDevice(f"device {number}") for number in range(count)]) is not None
        assert federated.trained.replied == count
        peaks.append(peak)
    assert peaks[0] == peaks[1] <= 2


def test_upload_bytes_are_counted(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)
    federated = strategy()
    train(federated, [FakeDevice("a"), FakeDevice("b")])
    assert federated.trained.bytes_up == sum(metrics.bytes_up for metrics in federated.trained.devices.values()) > 0
