"""Stored components of earlier versions open with their options, and the first form of a configuration is unchanged."""

from __future__ import annotations

from typing import Any

import pytest

from conf.renames import SIMULATE, present_words
from conf.stored_components import first_components, present_components

OORT = {
    "alpha": 2.0,
    "exploration": 0.9,
    "exploration_decay": 0.98,
    "min_exploration": 0.3,
    "cutoff": 0.95,
    "clip_quantile": 0.9,
    "duration_quantile": 0.3,
    "pacer_window": 20,
    "pacer_step": 0.05,
    "max_selections": None,
}
NO_OPTIMIZER = {"lr": None, "momentum": None, "beta2": None, "tau": None}
NO_EXACT = {"max_rank": None, "energy_fraction": None, "weighting": "device"}
NO_RULES = {"outlier_fraction": None, "norm_bound": None, "norm_factor": None}
REPLAY = {"threshold": 0.5, "capacity": 4194304}
NO_SELECTION = {"oort": OORT, "utility_weight": None, "candidate_factor": None}

FORMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "aggregation",
        {"name": "exact", "max_rank": 16, "energy_fraction": 0.9, "weighting": "rank_slice"},
        {"name": "exact", "max_rank": 16, "energy_fraction": 0.9, "weighting": "rank_slice"},
    ),
    ("aggregation", {"name": "fedit", **NO_EXACT}, {"name": "fedit"}),
    ("aggregation", {"name": "mine", **NO_EXACT, "options": {"length": 2}}, {"name": "mine", "length": 2}),
    ("server_optimizer", {"name": "none", **NO_OPTIMIZER}, {"name": "none"}),
    ("server_optimizer", {"name": "fedavgm", **NO_OPTIMIZER}, {"name": "fedavgm", "lr": 1.0, "momentum": 0.9}),
    (
        "server_optimizer",
        {"name": "fedyogi", **NO_OPTIMIZER, "lr": 0.1},
        {"name": "fedyogi", "lr": 0.1, "momentum": 0.9, "beta2": 0.99, "tau": 0.001},
    ),
    ("selection", {"name": "random", **NO_SELECTION}, {"name": "random"}),
    ("selection", {"name": "deadline", **NO_SELECTION}, {"name": "deadline", "candidate_factor": 2.0}),
    (
        "selection",
        {"name": "eafl", **NO_SELECTION, "oort": {**OORT, "alpha": 3.0}},
        {"name": "eafl", **OORT, "alpha": 3.0, "utility_weight": 0.25},
    ),
    ("robust", {"rules": [], **NO_RULES}, {}),
    (
        "robust",
        {"rules": ["replay", "norm_bound", "krum"], **NO_RULES, "norm_bound": 2.0},
        {"replay": REPLAY, "norm_bound": {"bound": 2.0, "factor": 1.0}, "krum": {"outlier_fraction": 0.2}},
    ),
    (
        "robust",
        {"rules": ["krum", "trimmed_mean"], **NO_RULES, "outlier_fraction": 0.1},
        {"krum": {"outlier_fraction": 0.1}, "trimmed_mean": {"outlier_fraction": 0.1}},
    ),
    (
        "robust",
        {"rules": ["krum", "trimmed_mean"], **NO_RULES, "options": {"trimmed_mean": {"outlier_fraction": 0.1}}},
        {"krum": {"outlier_fraction": 0.2}, "trimmed_mean": {"outlier_fraction": 0.1}},
    ),
    ("robust", {"rules": ["mine"], **NO_RULES, "options": {"mine": {"x": 1}}}, {"mine": {"x": 1}}),
    ("robust", {"rules": ["afa"], **NO_RULES, "options": {"afa": {"xi": 3.0}}}, {"afa": {"xi": 3.0, "step": 0.5}}),
    (
        "round_loop",
        {"mode": "sync", "buffer_size": None, "concurrency": None, "quorum": 1},
        {"name": "sync", "buffer_size": None, "concurrency": None, "quorum": 1},
    ),
    (
        "round_loop",
        {"mode": "async", "buffer_size": None, "concurrency": 4, "quorum": 1},
        {"name": "async", "buffer_size": 10, "concurrency": 4, "quorum": 1},
    ),
]
"""A group, its stored form of earlier versions, and its present form."""


@pytest.mark.parametrize(("group", "earlier", "present"), FORMS)
def test_forms(group: str, earlier: dict[str, Any], present: dict[str, Any]) -> None:
    others = {"rounds": 3, "data": {"writers": 2}}
    assert present_components({group: earlier, **others}) == {group: present, **others}
    assert first_components({group: present, **others}) == {group: earlier, **others}
    assert present_components({group: present}) == {group: present}


def test_repeated_rule_has_no_present_form() -> None:
    """Then a run with it is not resumed as one without."""
    stored = {"robust": {"rules": ["krum", "krum"], **NO_RULES}}
    assert present_components(stored) == stored


def test_order_of_rules_is_kept() -> None:
    present = present_components({"robust": {"rules": ["krum", "afa"], **NO_RULES}})["robust"]
    assert list(present) == ["krum", "afa"]
    assert first_components({"robust": present})["robust"]["rules"] == ["krum", "afa"]


@pytest.mark.parametrize(
    ("key", "value", "stored"), [("lr", 1, 1.0), ("tau", 1, 1.0), ("momentum", 0, 0.0), ("beta2", 0.5, 0.5)]
)
def test_numbers_have_the_type_of_their_former_keys(key: str, value: float, stored: float) -> None:
    first = first_components({"server_optimizer": {"name": "fedadam", key: value}})["server_optimizer"][key]
    assert (first, type(first)) == (stored, float)
    rank = first_components({"aggregation": {"name": "exact", "max_rank": 7}})["aggregation"]["max_rank"]
    assert (rank, type(rank)) == (7, int)


@pytest.mark.parametrize(
    ("stored", "present"),
    [
        ("robust.rules=[krum] robust.outlier_fraction=0.1", "robust=[krum] robust.krum.outlier_fraction=0.1"),
        (
            "robust.outlier_fraction=0.1 robust.rules=[krum,trimmed_mean]",
            "robust.krum.outlier_fraction=0.1 robust.trimmed_mean.outlier_fraction=0.1 robust=[krum,trimmed_mean]",
        ),
        ("robust.outlier_fraction=null rounds=3", "rounds=3"),
        ("robust.rules=[norm_bound] robust.norm_bound=null", "robust=[norm_bound]"),
        ("robust.rules=[norm_bound] robust.norm_bound=2", "robust=[norm_bound] robust.norm_bound.bound=2"),
        ("server_optimizer.name=fedavgm server_optimizer.lr=null", "server_optimizer=fedavgm"),
        ("server_optimizer.tau=0.001", ""),
        ("aggregation=fedit aggregation.max_rank=8", "aggregation=fedit"),
        ("aggregation=exact aggregation.max_rank=null", "aggregation=exact aggregation.max_rank=null"),
        ("aggregation.max_rank=8", "aggregation.max_rank=8"),
        ("aggregation=mine aggregation.options.length=2", "aggregation=mine aggregation.length=2"),
        ("selection=oort selection.oort.alpha=3", "selection=oort selection.alpha=3"),
        ("selection.oort.alpha=2.0 cohort.size=2", "cohort.size=2"),
        ("round_loop.mode=async round_loop.buffer_size=null", "round_loop=async"),
        ("planning.name=device", "planning=device"),
    ],
)
def test_stored_words(stored: str, present: str) -> None:
    assert present_words(stored.split(), SIMULATE) == present.split()
    assert present_words(present.split(), SIMULATE) == present.split()
