"""Compose a simulation's configuration from one string, as Flower's run configuration holds it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import hydra
from hydra import initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.errors import AntherError
from conf.cli import to_object
from conf.explain import explain, known_keys
from conf.overrides import prepare_overrides
from conf.plugin_options import offer_plugins
from conf.renames import SIMULATE, refuse_renamed
from conf.schemas.simulation import SimulationConfig


def compose(overrides: str | Sequence[str]) -> SimulationConfig:
    """Compose `conf/simulate.yaml` with overrides as on a command line.

    Args:
        overrides: `"rounds=3 privacy=example"`, or a list of such overrides.

    Raises:
        AntherError: one of them is refused.
    """
    try:
        words = shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
    except ValueError as error:
        raise AntherError(f"overrides={overrides}: {error}") from error
    refuse_renamed(words, SIMULATE)
    words = prepare_overrides(offer_plugins(words), SimulationConfig)
    try:
        with initialize_config_module("conf", version_base="1.3"):
            config = hydra.compose("simulate", overrides=words)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:  # ValueError: `group=null`
        raise AntherError(explain(error, known_keys(SimulationConfig), SIMULATE)) from error
    composed: SimulationConfig = to_object(config, SimulationConfig, SIMULATE)
    return composed
