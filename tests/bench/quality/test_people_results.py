"""Tests of the results on people, on losses with known gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from bench.quality.people_aims import AIMS, check_aims
from bench.quality.people_results import (
    curve_block,
    joined_block,
    members_block,
    pictures_block,
    private_block,
    steps_block,
    steps_fraction,
    steps_of_newcomers,
)
from common.errors import AntherError

NAMES = ("ann", "bo", "cy", "dora")
BASE = np.array([1.0, 2.0, 3.0, 4.0])


def federation(gain: float, shared: float = 0.1, newcomers: Sequence[str] = (), names: Sequence[str] = NAMES) -> Any:
    """Make a run in which every person gains a fraction of the base's loss."""
    people = {
        name: {
            "newcomer": name in newcomers,
            "base": base,
            "shared": base * (1 - shared),
            "personal": base * (1 - gain),
        }
        for name, base in zip(NAMES, BASE, strict=True)
        if name in names
    }
    return {"summary": {"clients": 9, "rounds": 4, "epsilon": None}, "people": people}


def local(*curve: float, tuned: float) -> Mapping[str, Any]:
    """Make a training without others with relative losses at steps 0, 10, 20, …, and at its tuned end."""
    order = [2, 0, 3, 1]
    return {
        "people": [NAMES[index] for index in order],
        "steps": [10 * point for point in range(len(curve))],
        "curve": [[BASE[index] * loss for loss in curve] for index in order],
        "stopped": [BASE[index] * tuned for index in order],
    }


def test_gains_are_relative_to_local_training() -> None:
    runs, trainings = [federation(0.4), federation(0.2)], [local(1, 0.7, 0.9, tuned=0.9), local(1, 0.7, 0.9, tuned=0.7)]
    block = members_block(runs, trainings)
    assert block["ratio"] == pytest.approx((1.5, 1.5, 1.5))  # means over seeds: 0.3 and 0.2
    assert block["ratio_by_seed"] == pytest.approx([4, 2 / 3])
    assert block["oracle_ratio"] == pytest.approx((1.0, 1.0, 1.0))
    assert (block["better"][0], block["people"], block["members"]) == (1.0, 4, 9)
    assert block["arms"]["shared"]["relative_gain"] == pytest.approx((0.1, 0.1, 0.1))
    assert block["arms"]["local"]["loss"][0] == pytest.approx(0.8 * 2.5)


def test_arms_with_other_bases_are_refused() -> None:
    with pytest.raises(AntherError, match=r"losses of the base differ by 4\.8%"):
        members_block([federation(0.4)], [local(1.05, 0.7, tuned=0.8)])


def test_newcomers_are_compared_with_themselves() -> None:
    joined = {
        "fold 1": federation(0.2, newcomers=NAMES[:2]),
        "fold 2": federation(0.3, newcomers=NAMES[2:]),
    }
    block = joined_block(joined, federation(0.4))
    assert block["groups"]["fold 1"] == {"people": 2, "share": pytest.approx((0.5, 0.5, 0.5))}
    assert block["groups"]["fold 2"]["share"][0] == pytest.approx(0.75)
    assert block["share"][0] == pytest.approx((0.2 * 3 + 0.3 * 7) / 4)
    assert block["people"] == 4


def test_steps_of_newcomers_are_counted_if_they_get_as_far() -> None:
    training = local(1, 0.7, 0.75, tuned=0.7)
    near, far = federation(0.31, newcomers=NAMES), federation(0.29, newcomers=NAMES)
    assert steps_of_newcomers({"all": near}, training, 5) == {"fraction": 0.5}
    assert steps_of_newcomers({"all": far}, training, 5) == {"fraction": None}


def test_private_gain_is_that_of_the_shared_adapter() -> None:
    runs = {"reference": [federation(0, 0.2)], "example-8": [federation(0.9, 0.15), federation(0.9, 0.05)]}
    runs["example-8"][0]["summary"]["epsilon"] = {"value": 7.9}
    block = private_block(runs)
    assert block["example-8"]["share"] == pytest.approx((0.5, 0.5, 0.5))
    assert block["example-8"]["epsilon"] == {"value": 7.9}
    assert block["reference"]["share"][0] == 1


def test_fraction_of_local_steps() -> None:
    """The best local mean is 0.6 after 20 steps; the federation reaches it halfway between 10 and 20."""
    training = local(1, 0.7, 0.6, 0.65, tuned=0.6)
    block = steps_block({20.0: federation(0.5), 10.0: federation(0.3), 5.0: federation(0.1)}, training)
    assert block["fraction"] == pytest.approx((0.75, 0.75, 0.75))
    assert list(block["federation"]) == ["5.0", "10.0", "20.0"]
    assert block["local"]["20"]["relative_gain"][0] == pytest.approx(0.4)


def test_fraction_that_is_not_reached() -> None:
    flat = np.ones((3, 2))
    assert steps_fraction([0, 10], np.array([[1, 0.5]] * 3), [5, 10], flat) is None
    some = np.array([[1.0, 0.9], [1.0, 0.2], [1.0, 0.2]])
    found = steps_fraction([0, 10], np.array([[1, 0.5]] * 3), [5, 10], some)
    assert found is not None
    assert found.value == pytest.approx((5 + 5 * 0.5 / (1 - 1.3 / 3)) / 10)
    assert found.high == np.inf


def test_people_of_several_federations_are_one_point() -> None:
    halves = [federation(0.1, names=NAMES[:2]), federation(0.3, names=NAMES[2:])]
    block = curve_block({2: halves, 4: [federation(0.5)]}, NAMES[1:])
    assert block["2"]["people"] == 3
    assert block["2"]["relative_gain"][0] == pytest.approx((0.1 * 2 + 0.3 * 7) / 9)
    assert block["4"]["relative_gain"][0] == pytest.approx(0.5)


def test_drawings_of_all_seeds_count() -> None:
    def seed(read: float) -> Any:
        return {
            "shipped": {
                "read": {"personal": [read, 0.5], "real": [0.8, 0.8]},
                "style": {"personal": [0.7, 0.9], "real": [0.9, 0.9]},
            }
        }

    block = pictures_block([seed(0.9), seed(0.7)])["shipped"]
    assert block["read"]["personal"][0] == pytest.approx(0.65)
    assert block["read_ratio"][0] == pytest.approx(0.65 / 0.8)
    assert block["style"]["personal"][0] == pytest.approx(0.8)
    assert block["style_share"][0] == pytest.approx(0.75)


def test_aims_are_met_or_missed() -> None:
    results = {
        "letters-5": {"ratio": (1.2, 1.1, 1.3), "better": (0.98, 0.9, 1.0)},
        "steps": {"fraction": (0.15, 0.1, 0.2)},
    }
    rows = {row["aim"]: row["met"] for row in check_aims(results)}
    assert list(rows.values()) == [False, True, True]
    assert len({aim.text for aim in AIMS}) == len(AIMS)
