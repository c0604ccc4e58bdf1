"""Parsing of nvidia-smi's output."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.power.conditions import Conditions
from client.power.nvidia import parse, read_gpus
from tests.helpers.power_fakes import system


@pytest.mark.parametrize(
    ("text", "watts", "celsius"),
    [
        ("80.50, 42\n", 80.5, 42.0),  # printed by an H200
        ("39.43, 47\n60.57, 61\n", 100.0, 61.0),
        ("[N/A], 47", None, 47.0),
        ("[Not Supported], [N/A]", None, None),
        ("39.43, 47\n[N/A], 50", None, 50.0),  # half of the watts would be no measurement
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", None, None),
        ("", None, None),
    ],
)
def test_parse_lines(text: str, watts: float | None, celsius: float | None) -> None:
    assert parse(text) == Conditions(watts=watts, celsius=celsius)


def test_command(tmp_path: Path) -> None:
    assert read_gpus(system(tmp_path, commands={"nvidia-smi": "80.50, 42"})).watts == 80.5
    assert read_gpus(system(tmp_path / "none")) == Conditions()
