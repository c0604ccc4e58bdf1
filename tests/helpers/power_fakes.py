"""A fake system: a folder of files, and shell scripts as commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from client.power.system import System

# Printed by a Pi 5 (github.com/jfikar/RPi5-power): about 13 W, most of it for the cores.
PMIC = """ 3V7_WL_SW_A current(0)=0.00000000A
   3V3_SYS_A current(1)=0.06245952A
   1V8_SYS_A current(2)=0.16102850A
  DDR_VDD2_A current(3)=0.00780744A
  VDD_CORE_A current(7)=10.87674000A
 3V7_WL_SW_V volt(8)=3.79999600V
   3V3_SYS_V volt(9)=3.30632200V
   1V8_SYS_V volt(10)=1.79828900V
  DDR_VDD2_V volt(11)=1.10292900V
  VDD_CORE_V volt(15)=0.89745940V
     EXT5V_V volt(24)=5.06788000V
      BATT_V volt(25)=3.01110800V
"""
PMIC_WATTS = 0.06245952 * 3.306322 + 0.1610285 * 1.798289 + 0.00780744 * 1.102929 + 10.87674 * 0.8974594

LAPTOP = {
    "AC/type": "Mains",
    "AC/online": "1",
    "BAT0/type": "Battery",
    "BAT0/present": "1",
    "BAT0/status": "Charging",
    "BAT0/capacity": "85",
    "BAT0/power_now": "21000000",
}
UNPLUGGED = LAPTOP | {"AC/online": "0", "BAT0/status": "Discharging"}


def system(tmp_path: Path, files: Mapping[str, str] | None = None, commands: Mapping[str, str] | None = None) -> System:
    """Create a fake system.

    Args:
        tmp_path: folder for its files and commands.
        files: content of each file by path.
        commands: output of each command; an empty one fails.
    """
    root, path = tmp_path / "root", tmp_path / "bin"
    root.mkdir(parents=True, exist_ok=True)
    path.mkdir(exist_ok=True)
    for name, text in (files or {}).items():
        write(root / name, text)
    for name, text in (commands or {}).items():
        script = path / name
        script.write_text(f"#!/bin/sh\n/bin/cat <<'EOF'\n{text}\nEOF\n" if text else "#!/bin/sh\nexit 1\n")
        script.chmod(0o755)
    return System(root=root, path=str(path))


def supplies(files: Mapping[str, str]) -> dict[str, str]:
    """Return paths below /sys/class/power_supply."""
    return {f"sys/class/power_supply/{name}": text for name, text in files.items()}


def write(file: Path, text: str) -> None:
    """Write a file with its folders, and with a line end like the kernel's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")
