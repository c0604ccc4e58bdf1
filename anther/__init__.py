"""The public Python API of Anther, and its command line (`anther.cli`).

    import anther

    result = anther.simulate("preset=quick data.writers=3", "outputs/first")
    print(result.summary["loss"], result.report)

Names are imported when they are first used: `import anther` loads neither PyTorch nor Hydra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.data import Pictures, load_folder
    from common.errors import AntherError
    from conf.compose import compose
    from conf.schemas.simulation import SimulationConfig
    from models.base.base import Base
    from models.base.base import load as load_base
    from models.export.fuse import fuse
    from models.export.layouts import export as export_adapter
    from models.lora.adapter import Adapter, Factors, Site, Sites
    from privacy.accounting import Guarantee, epsilon
    from simulations.run import SimulationResult, simulate
    from strategies.aggregation import Aggregated, Aggregation

__all__ = [
    "Adapter",
    "Aggregated",
    "Aggregation",
    "AntherError",
    "Base",
    "Factors",
    "Guarantee",
    "Pictures",
    "SimulationConfig",
    "SimulationResult",
    "Site",
    "Sites",
    "compose",
    "epsilon",
    "export_adapter",
    "fuse",
    "load_base",
    "load_folder",
    "simulate",
]

_SOURCES = {
    "Adapter": "models.lora.adapter",
    "Aggregated": "strategies.aggregation",
    "Aggregation": "strategies.aggregation",
    "AntherError": "common.errors",
    "Base": "models.base.base",
    "Factors": "models.lora.adapter",
    "Guarantee": "privacy.accounting",
    "Pictures": "client.data",
    "SimulationConfig": "conf.schemas.simulation",
    "SimulationResult": "simulations.run",
    "Site": "models.lora.adapter",
    "Sites": "models.lora.adapter",
    "compose": "conf.compose",
    "epsilon": "privacy.accounting",
    "export_adapter": "models.export.layouts:export",
    "fuse": "models.export.fuse",
    "load_base": "models.base.base:load",
    "load_folder": "client.data",
    "simulate": "simulations.run",
}
"""Module of each name, and its name in that module if it differs."""


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, original = _SOURCES[name].partition(":")
    return getattr(importlib.import_module(module), original or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
