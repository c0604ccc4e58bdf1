"""What the firmware of a Raspberry Pi tells, by `vcgencmd`; its user must be in the group `video`.

The form of `pmic_read_adc` is that of published outputs of a Pi 5: a line for each current and each voltage, paired by
the rail's name and not by their numbers. Bits of `get_throttled` are those of Raspberry Pi's documentation.
"""

from __future__ import annotations

import re

from client.power.conditions import Conditions
from client.power.system import System, to_number

COVERS = (
    "the board by the sum of its PMIC's rails (Pi 5): without USB, HATs, NVMe and the converter's own loss, so that "
    "the wall sees about 15 % and 0.6 W more (one person's fit, github.com/jfikar/RPi5-power)"
)
SLOWER = 0b1110  # now: frequency capped, throttled, soft temperature limit; bit 0 alone is a weak supply

_RAIL = re.compile(r"\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=(-?[\d.]+)[AV]\s*")


def watts(system: System) -> float | None:
    """What the rails of the PMIC give together, now; readings jump from one to the next."""
    return rails(system.output("vcgencmd", "pmic_read_adc") or "")


def rails(text: str) -> float | None:
    """Σ V·A over rails, in watts; None if there are none, or if one has a current and no voltage."""
    found: dict[str, dict[str, float]] = {"A": {}, "V": {}}
    for line in text.splitlines():
        if (match := _RAIL.fullmatch(line)) and (value := to_number(match[3])) is not None:
            found[match[2]][match[1]] = value
    amperes, volts = found["A"], found["V"]  # EXT5V and BATT are voltages alone
    if not amperes or amperes.keys() - volts.keys():
        return None
    return sum(current * volts[rail] for rail, current in amperes.items())


def slowed(system: System) -> Conditions:
    """Whether the firmware slows it down."""
    return Conditions(throttled=throttled(system.output("vcgencmd", "get_throttled") or ""))


def throttled(text: str) -> bool | None:
    """Of `throttled=0x50005`: only what holds now counts; None if it says something else."""
    match = re.fullmatch(r"\s*throttled=0x([0-9a-fA-F]+)\s*", text)
    return bool(int(match[1], 16) & SLOWER) if match else None
