"""Power and throttling of a Raspberry Pi, by its firmware's `vcgencmd`; the user must be in the group `video`.

The format of `pmic_read_adc` is taken from published outputs of a Pi 5: one line for each current and each voltage,
paired by the rail's name and not by their numbers. The bits of `get_throttled` are those of Raspberry Pi's
documentation.
"""

from __future__ import annotations

import re
from functools import partial

from client.power.conditions import Conditions
from client.power.meter import EnergySource, power_meter
from client.power.system import System, to_number

COVERS = (
    "the board by the sum of its PMIC's rails (Pi 5): without USB, HATs, NVMe and the converter's own loss; at "
    "the wall it is about 15 % and 0.6 W more (a fit by github.com/jfikar/RPi5-power)"
)
SLOWER = 0b1110  # currently: frequency capped, throttled, soft temperature limit; bit 0 only means a weak supply

_RAIL = re.compile(r"\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=(-?[\d.]+)[AV]\s*")


def watts(system: System) -> float | None:
    """Read the total power of the PMIC's rails; successive readings vary considerably."""
    return rails(system.output("vcgencmd", "pmic_read_adc") or "")


def rails(text: str) -> float | None:
    """Return Σ V·A over rails, in watts; None if there are no rails, or if one has a current and no voltage."""
    values: dict[str, dict[str, float]] = {"A": {}, "V": {}}
    for line in text.splitlines():
        if (match := _RAIL.fullmatch(line)) and (value := to_number(match[3])) is not None:
            values[match[2]][match[1]] = value
    amperes, volts = values["A"], values["V"]  # EXT5V and BATT have only voltages
    if not amperes or amperes.keys() - volts.keys():
        return None
    return sum(current * volts[rail] for rail, current in amperes.items())


def throttling(system: System) -> Conditions:
    """Return whether the firmware slows the processor down."""
    return Conditions(throttled=parse_throttled(system.output("vcgencmd", "get_throttled") or ""))


def parse_throttled(text: str) -> bool | None:
    """Parse `throttled=0x50005`; only the current-state bits count. None: other output."""
    match = re.fullmatch(r"\s*throttled=0x([0-9a-fA-F]+)\s*", text)
    return bool(int(match[1], 16) & SLOWER) if match else None


@power_meter("pi5", order=1, hint=": needs a Raspberry Pi 5, and `vcgencmd` allowed (group video)")
def pi5(system: System) -> EnergySource:
    """Make the meter of a Raspberry Pi 5."""
    return EnergySource(name="pi5", covers=COVERS, read=partial(watts, system))
