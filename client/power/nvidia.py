"""NVIDIA's boards, by `nvidia-smi`, which comes with their driver; no Jetson has it."""

from __future__ import annotations

from client.power.conditions import Conditions
from client.power.system import System, to_number

COVERS = "all NVIDIA boards of this machine (NVML), and nothing else of it"
QUERY = ("nvidia-smi", "--query-gpu=power.draw,temperature.gpu", "--format=csv,noheader,nounits")


def boards(system: System) -> Conditions:
    """Watts and heat of the boards."""
    return parsed(system.output(*QUERY) or "")


def parsed(text: str) -> Conditions:
    """Of a line `39.43, 47` for each board, with [N/A] or the like for what it doesn't measure."""
    rows = [[to_number(cell.strip()) for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    if not rows or any(len(row) != 2 for row in rows):
        return Conditions()
    watts = [row[0] for row in rows if row[0] is not None]
    return Conditions(
        celsius=max((row[1] for row in rows if row[1] is not None), default=None),
        watts=sum(watts) if len(watts) == len(rows) else None,
    )
