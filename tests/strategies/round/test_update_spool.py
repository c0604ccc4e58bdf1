"""Updates on disk: the same as in memory, in the order of names, and no more of them in memory for more devices."""

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.lora.adapter import Factors
from protocol.messages import ExamplePrivacy
from strategies.aggregation import shares
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
@settings(max_examples=30, deadline=None)
def test_what_is_read_is_what_was_written_by_name(ranks, shuffled):
    """Of any rank, none among them, at all sites or fewer."""
    wanted = {}
    for number, size in enumerate(ranks):
        adapter = random_adapter(size, number)
        wanted[f"device {number}", number] = adapter if number % 2 else {"y": adapter["y"]}
    with UpdateSpool() as spool:
        for key in shuffled.sample(sorted(wanted), len(wanted)):
            spool.add(key, wanted[key])
        assert spool.keys == sorted(wanted)
        assert bool(spool) == bool(wanted)
        for _ in range(2):  # as often as one likes
            for (found, weight), key in zip(spool, sorted(wanted), strict=True):
                assert weight == 1.0
                assert found.keys() == wanted[key].keys()
                assert all(
                    torch.equal(a, b) for site in found for a, b in zip(found[site], wanted[key][site], strict=True)
                )
        assert len(spool[:2]) == min(2, len(wanted))


def test_a_device_may_have_several_updates_of_one_round():
    with UpdateSpool() as spool:
        for number in (10_002, 10_001):
            spool.add(("a", number), random_adapter(1, number))
        assert spool.keys == [("a", 10_001), ("a", 10_002)]
        assert torch.equal(spool[1][0]["x"].a, random_adapter(1, 10_002)["x"].a)


def test_a_rule_that_goes_by_sites_reads_each_of_them_once(monkeypatch):
    read = []
    with UpdateSpool() as spool:
        for number in range(4):
            spool.add((f"device {number}", 1), random_adapter(2, number))
        really = torch.frombuffer
        monkeypatch.setattr(torch, "frombuffer", lambda *given, **named: read.append(1) or really(*given, **named))
        for site in SITES:
            assert len(shares(spool, site)) == 4
    assert len(read) == 4 * len(SITES) * 2


def test_views_outlive_the_file():
    with UpdateSpool() as spool:
        spool.add(("a", 1), random_adapter(2, 0))
        (found, _) = spool[0]
    del spool
    assert torch.equal(found["x"].a, random_adapter(2, 0)["x"].a)


def test_an_update_comes_once_and_before_any_is_read():
    with UpdateSpool() as spool:
        spool.add(("a", 1), random_adapter(1, 0))
        with pytest.raises(ValueError, match="a: an update comes once"):
            spool.add(("a", 1), random_adapter(1, 0))
        assert len(list(spool)) == 1
        with pytest.raises(ValueError, match="before any is read"):
            spool.add(("b", 1), random_adapter(1, 0))


def test_a_full_disk_costs_the_update_that_it_has_no_room_for():
    class Full:
        """Room for so many bytes."""

        def __init__(self, file, room):
            self._file, self._room = file, room

        def write(self, data):
            if self._file.tell() + len(data) > self._room:
                raise OSError(28, "No space left on device")
            return self._file.write(data)

        def __getattr__(self, name):
            return getattr(self._file, name)

    with UpdateSpool() as spool:
        spool.add(("a", 1), random_adapter(2, 0))
        spool._file = Full(spool._file, spool._end + 150)
        with pytest.raises(ReplyRejectedError, match="b: the server can't store its update: No space left") as caught:
            spool.add(("b", 1), random_adapter(2, 1))
        assert caught.value.reason == "no room"
        spool.add(("c", 1), {"x": Factors(torch.ones(1, 3), torch.ones(2, 1))})
        assert spool.keys == [("a", 1), ("c", 1)]
        assert torch.equal(spool[1][0]["x"].b, torch.ones(2, 1))


RULES = {
    "exact": {"aggregation": Exact(rank=PLAN.rank, max_rank=4, seed=0)},
    "exact by slice": {"aggregation": Exact(rank=PLAN.rank, max_rank=4, by_slice=True, seed=0)},
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
def test_decoded_updates_do_not_pile_up(rule, tmp_path, monkeypatch):
    """Of 3 devices and of 12 as many are in memory at once: the one that is let in."""
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)
    alive, most = weakref.WeakSet(), 0
    really = validation.from_trained_tensors

    class Counted(dict):
        """A decoded adapter that can be counted."""

        __hash__ = object.__hash__

    def counting(*given):
        nonlocal most
        adapter = Counted(really(*given))
        alive.add(adapter)
        most = max(most, len(alive))
        return adapter

    monkeypatch.setattr(validation, "from_trained_tensors", counting)
    peaks = []
    for count in (3, 12):
        most = 0
        changes = RULES[rule]
        federated = strategy(**changes) if changes else private(tmp_path / str(count))
        assert train(federated, [FakeDevice(f"device {number}") for number in range(count)]) is not None
        assert federated.trained.replied == count
        peaks.append(most)
    assert peaks[0] == peaks[1] <= 2


def test_the_bytes_of_every_update_are_counted_without_being_kept(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)
    federated = strategy()
    train(federated, [FakeDevice("a"), FakeDevice("b")])
    assert federated.trained.bytes_up == sum(facts.bytes_up for facts in federated.trained.devices.values()) > 0
