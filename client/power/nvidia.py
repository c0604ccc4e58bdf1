"""Power and temperature of NVIDIA GPUs, by `nvidia-smi`, which comes with the driver; Jetson boards don't have it."""

from __future__ import annotations

from client.power.conditions import Conditions
from client.power.meter import EnergySource, power_meter
from client.power.system import System, to_number

COVERS = "all NVIDIA GPUs of this machine (NVML), and no other part"
QUERY = ("nvidia-smi", "--query-gpu=power.draw,temperature.gpu", "--format=csv,noheader,nounits")


def read_gpus(system: System) -> Conditions:
    """Read watts and temperature of all GPUs."""
    return parse(system.output(*QUERY) or "")


def parse(text: str) -> Conditions:
    """Parse one line `39.43, 47` per GPU; a value that isn't measured is [N/A] or similar."""
    rows = [[to_number(cell.strip()) for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    if not rows or any(len(row) != 2 for row in rows):
        return Conditions()
    watts = [row[0] for row in rows if row[0] is not None]
    return Conditions(
        celsius=max((row[1] for row in rows if row[1] is not None), default=None),
        watts=sum(watts) if len(watts) == len(rows) else None,
    )


@power_meter("nvml", order=0, cuda=True, hint=": needs NVIDIA's driver with nvidia-smi")
def nvml(system: System) -> EnergySource:
    """Make the meter of the GPUs."""
    return EnergySource(name="nvml", covers=COVERS, read=lambda: read_gpus(system).watts)
