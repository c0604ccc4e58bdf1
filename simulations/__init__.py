"""A fleet on one machine: profiles, the in-process grid, evaluation of the arms, run.py.

From Python:

    from simulations import simulate

    result = simulate("preset=quick data.writers=3", "outputs/first")
    print(result.summary["loss"], result.report)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulations.run import Result, simulate

__all__ = ["Result", "simulate"]


def __getattr__(name: str) -> Any:
    """Import Hydra and the display only for those who ask for `simulate`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from simulations import run

    return getattr(run, name)
