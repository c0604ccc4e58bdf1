"""Selections of a configuration: the devices that train, and those that evaluate."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

from common.errors import AntherError
from conf.schemas.federation import FederationConfig
from privacy.noise import noise_source
from strategies.declarations import create
from strategies.registry import SELECTIONS
from strategies.selection import NameSelection, Selection
from strategies.selection.everyone import Everyone
from strategies.selection.fixed_panel import FixedPanel
from strategies.selection.sample import Sample


def build_selection(config: FederationConfig, seed: int | None) -> Selection:
    """Build the selection for training.

    It selects each device with probability `cohort.sampling_rate`, or `cohort.size` devices by `selection`, or all.

    Args:
        config: configuration of the run.
        seed: seed of Poisson sampling; None: randomness of the operating system, which can't be reproduced.

    Raises:
        AntherError: a setting that the selection needs is missing.
    """
    if config.selection.name != "random" and config.cohort.size is None:
        raise AntherError(f"selection={config.selection.name} requires cohort.size")
    name, size = selection_name(config), config.cohort.size
    known: dict[str, Any] = {
        "seed": config.seed,
        "rng": partial(noise_source, purpose="selection", client="server", seed=seed),
        "rate": config.cohort.sampling_rate,
        "deadline": config.planning.deadline,
    }
    if size is not None:
        known["size"] = math.ceil(size * config.cohort.overselection)
    options = config.selection.options if name == config.selection.name else {}
    return cast(Selection, create(SELECTIONS, name, options, key="selection", known=known))


def selection_name(config: FederationConfig) -> str:
    """Return the name of the selection for training: of `selection`, or the one that a key of `cohort` chooses."""
    cohort = config.cohort
    if cohort.size is not None:
        return config.selection.name
    key = "cohort.size=null" if cohort.sampling_rate is None else "cohort.sampling_rate"
    return next(name for name, one in SELECTIONS.items() if getattr(one, "chosen_by", None) == key)


def build_evaluation_selection(config: FederationConfig) -> NameSelection:
    """Build the selection for evaluation: `cohort.eval_size` devices, else `cohort.size`, else all.

    The devices are the same in every round. Under privacy they change, since each evaluation is charged to its device.
    """
    size = config.cohort.size if config.cohort.eval_size is None else config.cohort.eval_size
    if size is None or config.privacy.of_examples or config.privacy.of_devices:
        return Everyone() if size is None else Sample(size=size, seed=config.seed, purpose="evaluation")
    return FixedPanel(size=size, seed=config.seed)
