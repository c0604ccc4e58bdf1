"""Tests of the generated strategies page."""

import pytest

from bench.quality import strategies_page


def runs(*shared):
    return [{"losses": {"base": [2.0, 2.0], "shared": list(shared)}}]


CELLS = [
    {"rule": "exact", "setting": "ranks", "gain": [0.12, 0.1, 0.14], "runs": runs(1.8, 1.7)},
    {"rule": "hetlora", "setting": "ranks", "gain": [0.1, 0.08, 0.12], "runs": runs(1.9, 1.8)},
    {"rule": "fedsa", "setting": "skew", "gain": [0.2, 0.1, 0.3], "runs": runs(1.6, 1.6)},
    {"rule": "exact", "setting": "skew", "gain": [-0.01, -0.02, 0.0], "runs": runs(2.0, 2.1)},
]
RUN = {"hours": 2.0, "kwh": 0.1, "battery_kwh": 0.05, "round": 4, "lost": {"flat": 1}, "gini": 0.3, "best": 0.1}
ATTACKS = [{"attack": "nan", "protected": False, "seed": seed, "kept": 0.5, "backdoor": 0.75} for seed in (0, 1, 2)] + [
    {"attack": "nan", "protected": True, "seed": 0, "kept": 0.9, "backdoor": 0.0}
]


def test_best_shared_rule_is_bold_and_personal_starred():
    rows = list(strategies_page.aggregation_section(CELLS))
    assert "| exact | **12.00** | **-1.00** |" in rows
    assert "| hetlora | 10.00 |  |" in rows
    assert "| fedsa |  | 20.00* |" in rows
    assert rows[-2] == "| hetlora | -5.00 [-5.00, -5.00] |"  # paired by writer


def test_missed_targets_have_no_ratio():
    never = {**RUN, "hours": None, "kwh": None, "battery_kwh": None, "round": None}
    arms = {"random": [RUN, RUN], "ours": [{**RUN, "hours": 1.0}] * 2, "other": [RUN, never]}
    rows = list(strategies_page.fleets_section({"week": arms}))
    assert "| ours | 2 of 2 | 4 | 1.0 | 0.50 | 0.10 | 1.00 | 0.05 | 2 flat | 0.30 |" in rows
    assert "| other | 1 of 2 | — | — | — | — | — | — | 2 flat | 0.30 |" in rows


def test_attacks_are_compared_with_no_rules():
    assert "| nan | 50% [50%] | 90% [90%] | 75% [75%] | 0% [0%] |" in list(strategies_page.robustness_section(ATTACKS))


def test_page_is_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(strategies_page, "DOCS", tmp_path)
    strategies_page.write_page()
    for name in ("strategies.md", "aggregators.svg", "fleets.svg"):
        assert (tmp_path / name).read_text() == (strategies_page.RESULTS.parents[1] / "docs" / name).read_text(), (
            "run anther bench strategies page"
        )


@pytest.mark.parametrize("name", ["aggregators", "robustness", "fleets"])
def test_missing_results_are_left_out(name, tmp_path, monkeypatch):
    monkeypatch.setattr(strategies_page, "RESULTS", tmp_path)
    assert strategies_page.read_results(name) is None
