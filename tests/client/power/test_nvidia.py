"""Lines of nvidia-smi."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.power.conditions import Conditions
from client.power.nvidia import boards, parsed
from tests.helpers.power_fakes import system


@pytest.mark.parametrize(
    ("text", "watts", "celsius"),
    [
        ("80.50, 42\n", 80.5, 42.0),  # as an H200 printed it
        ("39.43, 47\n60.57, 61\n", 100.0, 61.0),
        ("[N/A], 47", None, 47.0),
        ("[Not Supported], [N/A]", None, None),
        ("39.43, 47\n[N/A], 50", None, 50.0),  # half of them would be no measurement
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", None, None),
        ("", None, None),
    ],
)
def test_lines(text: str, watts: float | None, celsius: float | None) -> None:
    assert parsed(text) == Conditions(watts=watts, celsius=celsius)


def test_the_command(tmp_path: Path) -> None:
    assert boards(system(tmp_path, commands={"nvidia-smi": "80.50, 42"})).watts == 80.5
    assert boards(system(tmp_path / "none")) == Conditions()
