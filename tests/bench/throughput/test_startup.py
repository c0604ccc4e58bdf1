"""Tests of the start-up benchmark: phases end in order, and their medians are over repeats."""

from __future__ import annotations

import pytest

from bench.throughput.startup import Ends, durations, run_program, table

ANTHER = [
    "command imported",
    "configuration composed",
    "PyTorch imported",
    "base loaded",
    "pictures encoded",
    "first step trained",
]


def test_medians_of_durations() -> None:
    runs: list[Ends] = [
        {"imports": (1.0, 2.0), "step": (4.0, 6.0)},
        {"imports": (2.0, 8.0), "step": (3.0, 9.0)},
        {"imports": (3.0, 3.0), "step": (5.0, 5.0)},
    ]
    assert durations(runs) == {"imports": (2.0, 3.0), "step": (2.0, 2.0), "total": (4.0, 6.0)}


@pytest.mark.parametrize(("seconds", "reached"), [(6.0, "yes"), (6.01, "no")])
def test_limit_is_for_wall_seconds(seconds: float, reached: str) -> None:
    shown = table({"anther": [{"step": (9.0, seconds)}], "torch": [{"imports": (1.0, 1.0)}]})
    assert str(shown.caption).endswith(reached)
    assert shown.row_count == 4


@pytest.mark.stress
@pytest.mark.parametrize(("name", "phases"), [("anther", ANTHER), ("script", ANTHER[2:])])
def test_program_ends_with_its_first_step(name: str, phases: list[str]) -> None:
    ends = run_program(name)
    assert list(ends) == phases
    for column in range(2):
        assert sorted(end[column] for end in ends.values()) == [end[column] for end in ends.values()]


@pytest.mark.integration
def test_failed_program_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'absent'"):
        run_program("absent")
