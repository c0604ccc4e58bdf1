"""A file in place of sensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.power.conditions import ESTIMATE, Conditions
from client.power.stated import read_stated
from common.errors import AntherError


def test_values_of_file(tmp_path: Path) -> None:
    file = tmp_path / "power.json"
    file.write_text(
        json.dumps({"charging": True, "battery": 1, "celsius": None, "watts": 3, "watts_quality": ESTIMATE})
    )
    assert read_stated(file) == Conditions(charging=True, battery=1.0, watts=3.0, watts_quality=ESTIMATE)
    file.write_text("{}")
    assert read_stated(file) == Conditions()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "can't be read"),
        ('{"charging": tr', "can't be read"),
        ("[]", "not a JSON object"),
        ('{"charger": true}', "charger"),
        ('{"charging": 1}', "charging"),
        ('{"battery": 85}', "0 to 1"),
        ('{"battery": true}', "battery"),
        ('{"celsius": "hot"}', "celsius"),
        ('{"watts": -1}', "watts"),
        ('{"watts": NaN}', "watts"),
        ('{"free_mib": -1}', "free_mib"),
        ('{"watts_quality": "guess"}', "watts_quality"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "power.json"
    file.write_text(text)
    with pytest.raises(AntherError, match=named) as raised:
        read_stated(file)
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="can't be read"):
        read_stated(tmp_path / "none")
