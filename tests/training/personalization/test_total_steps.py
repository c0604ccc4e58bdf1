"""Optimizer steps of a device, which the arm without a federation gets too."""

from __future__ import annotations

import pytest

from training.personalization import build, total_steps


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lora", {}, 4 * 10 + 20),
        ("prior", {}, 4 * 10 + 20),
        ("fedalt", {"steps": 3.0}, 4 * (10 + 3) + 20),
        ("directions", {"steps": 7.0, "round_steps": 2.0}, 4 * (10 + 2) + 20 + 7),
        ("population", {"steps": 7.0, "round_steps": 30.0}, 3 * 10 + 30 + 20 + 7),
    ],
)
def test_steps_of_methods_count(name: str, options: dict[str, float], expected: int) -> None:
    assert total_steps(build(name, options), rounds=4, shared=10, personal=20) == expected
