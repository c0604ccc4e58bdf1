"""Simulation of a whole federation on one machine.

From Python:

    from simulations import simulate

    result = simulate("preset=quick data.writers=3", "outputs/first")
    print(result.summary["loss"], result.report)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common import moved_commands

if TYPE_CHECKING:
    from simulations.run import SimulationResult, simulate

__all__ = ["SimulationResult", "simulate"]

moved_commands.install()


def __getattr__(name: str) -> Any:
    """Import Hydra and the display only when `simulate` is used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from simulations import run

    return getattr(run, name)
