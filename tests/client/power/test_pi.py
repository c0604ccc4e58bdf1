"""Output of a Raspberry Pi's firmware, including invalid output."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.power import pi
from client.power.conditions import Conditions
from tests.helpers.power_fakes import PMIC, PMIC_WATTS, system


def test_watts_of_all_rails(tmp_path: Path) -> None:
    assert pi.rails(PMIC) == pytest.approx(PMIC_WATTS)
    assert pi.watts(system(tmp_path, commands={"vcgencmd": PMIC})) == pytest.approx(PMIC_WATTS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        'error=1 error_msg="Command not registered"',  # a Pi 4
        "EXT5V_V volt(24)=5.06788000V",  # no current at all
        PMIC.replace("VDD_CORE_V volt(15)=0.89745940V", "VDD_CORE_V volt(15)="),  # truncated
        PMIC.replace("VDD_CORE_V volt(15)=0.89745940V", "VDD_CORE_V volt(15)=0.89.74V"),
    ],
)
def test_invalid_output_is_no_reading(text: str) -> None:
    assert pi.rails(text) is None


def test_without_vcgencmd(tmp_path: Path) -> None:
    assert pi.watts(system(tmp_path)) is None
    assert pi.throttling(system(tmp_path)) == Conditions()
    assert pi.watts(system(tmp_path, commands={"vcgencmd": ""})) is None  # the user isn't in the group video


@pytest.mark.parametrize(
    ("text", "throttled"),
    [
        ("throttled=0x0", False),
        ("throttled=0x50000\n", False),  # only in the past, since the last start
        ("throttled=0x1", False),  # weak supply without throttling
        ("throttled=0x50005", True),
        ("throttled=0x2", True),
        ("throttled=0x80008", True),
        ("throttled=0x", None),
        ("error", None),
        ("", None),
    ],
)
def test_throttled(tmp_path: Path, text: str, throttled: bool | None) -> None:
    assert pi.parse_throttled(text) is throttled
    assert pi.throttling(system(tmp_path, commands={"vcgencmd": text or " "})).throttled is throttled
