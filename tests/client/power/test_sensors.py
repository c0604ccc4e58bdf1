"""Choice of a device's sensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.power.conditions import ESTIMATE, Conditions
from client.power.meter import Meter
from client.power.sensors import PowerSensors, choose_sensors
from client.power.system import System
from client.power.termux import BATTERY
from common.errors import AntherError
from conf.schemas.node import PowerConfig
from tests.helpers.power_fakes import LAPTOP, PMIC, PMIC_WATTS, UNPLUGGED, supplies, system

COUNTER = {"sys/class/powercap/intel-rapl:0/name": "package-0", "sys/class/powercap/intel-rapl:0/energy_uj": "5"}
PHONE = json.dumps({"plugged": "UNPLUGGED", "percentage": 50, "voltage": 4000, "current": -500000})
BOARD = {"nvidia-smi": "80.50, 42"}


def choose_for(meter: str, machine: System, *, cuda: bool = False) -> PowerSensors:
    return choose_sensors(PowerConfig(meter=meter), machine, cuda=cuda)


def test_no_sensors(tmp_path: Path) -> None:
    machine = choose_for("auto", system(tmp_path))
    assert (machine.name, machine.source) == ("none", None)
    assert machine.read() == Conditions()


def test_first_working_meter_is_chosen(tmp_path: Path) -> None:
    everything = system(tmp_path, supplies(UNPLUGGED) | COUNTER, {"vcgencmd": PMIC, BATTERY: PHONE} | BOARD)
    assert choose_for("auto", everything).name == "pi5"
    assert choose_for("auto", everything, cuda=True).name == "nvml"
    (tmp_path / "bin/vcgencmd").unlink()
    assert choose_for("auto", everything).name == "battery"
    plugged = system(tmp_path, supplies(LAPTOP))
    assert choose_for("auto", plugged).name == "termux"
    (tmp_path / "bin" / BATTERY).unlink()
    assert choose_for("auto", plugged).name == "rapl"
    (tmp_path / "root/sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    assert choose_for("auto", plugged).name == "none"  # a GPU that training doesn't use isn't measured
    assert choose_for("nvml", plugged).name == "nvml"
    assert choose_for("none", everything).source is None


def test_covers_describes_the_meter(tmp_path: Path) -> None:
    everything = system(tmp_path, supplies(UNPLUGGED) | COUNTER, {"vcgencmd": PMIC, BATTERY: PHONE} | BOARD)
    covers = {
        meter: choose_for(meter, everything).covers for meter in ("pi5", "battery", "termux", "rapl", "nvml", "none")
    }
    assert "USB" in covers["pi5"]
    assert "no other part" in covers["nvml"]
    assert len(set(covers.values())) == 6


@pytest.mark.parametrize("meter", ["pi5", "battery", "rapl", "nvml", "termux"])
def test_missing_meter_is_refused(tmp_path: Path, meter: str) -> None:
    with pytest.raises(AntherError, match=rf"power\.meter={meter}: .*: ") as raised:
        choose_for(meter, system(tmp_path))
    assert "\n" not in str(raised.value)


def test_battery_meter_is_accepted_while_charging(tmp_path: Path) -> None:
    """Training while charging measures nothing with it: the result is an estimate, not an error."""
    machine = choose_for("battery", system(tmp_path, supplies(LAPTOP)))
    now = [0.0]
    with (meter := Meter(machine.source, watts=5.0, clock=lambda: now[0])):
        now[0] = 2.0
    assert meter.last == (2.0, 10.0, ESTIMATE)


def test_all_sensors_are_read(tmp_path: Path) -> None:
    thermal = {"sys/class/thermal/thermal_zone0/temp": "61000", "proc/meminfo": "MemAvailable: 2048 kB"}
    machine = system(tmp_path, supplies(LAPTOP) | thermal, {"vcgencmd": "throttled=0x4", "busctl": "b false"})
    assert choose_for("none", machine).read() == Conditions(
        charging=True, battery=0.85, celsius=61.0, throttled=True, free_mib=2.0, owner_active=True
    )


def test_pi_meter(tmp_path: Path) -> None:
    machine, now = choose_for("auto", system(tmp_path, commands={"vcgencmd": PMIC})), [0.0]
    with (meter := Meter(machine.source, watts=1.0, clock=lambda: now[0])):
        now[0] = 10.0
    assert meter.last is not None
    assert meter.last.joules == pytest.approx(10 * PMIC_WATTS)


def test_file_replaces_sensors(tmp_path: Path) -> None:
    """The file may omit memory."""
    file = tmp_path / "power.json"
    file.write_text(json.dumps({"charging": True, "watts": 7}))
    machine = choose_sensors(
        PowerConfig(meter="file", file=str(file)), system(tmp_path, {"proc/meminfo": "MemAvailable: 2048 kB"})
    )
    assert machine.name == "file"
    assert machine.read() == Conditions(charging=True, watts=7.0, free_mib=2.0)
    assert machine.source is not None
    assert machine.source.read() == 7.0
    file.write_text(json.dumps({"charging": False, "free_mib": 1}))
    assert machine.read() == Conditions(charging=False, free_mib=1.0)
    file.write_text("{")
    with pytest.raises(AntherError, match=r"power\.file"):
        machine.read()
    with pytest.raises(AntherError, match=r"power\.file"):
        choose_sensors(PowerConfig(meter="file", file=str(file)), system(tmp_path))


@pytest.mark.integration
def test_imports_are_light() -> None:
    """A device can be asked whether it may train before anything large is loaded."""
    script = (
        "import sys, client.power.sensors, client.runtime.throttle\n"
        "heavy = {'torch', 'numpy', 'flwr', 'psutil', 'models', 'training', 'server', 'strategies', 'simulations'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"
