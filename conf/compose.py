"""Compose a configuration from one string, as Flower's run configuration holds it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import hydra
from hydra import initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.errors import AntherError
from conf.cli import to_object
from conf.data_keys import refuse_other_data
from conf.explain import explain, known_keys
from conf.groups import refuse_wrong_selections
from conf.overrides import prepare_overrides
from conf.plugin_options import offer_plugins
from conf.renames import SIMULATE, refuse_renamed
from conf.schemas.federation import FederationConfig
from conf.schemas.simulation import SimulationConfig
from conf.schemas.training import ExpectedDataConfig
from conf.simulation_keys import federation_words, refuse_simulation_keys


def compose(overrides: str | Sequence[str]) -> SimulationConfig:
    """Compose `conf/simulate.yaml` with overrides as on a command line.

    Args:
        overrides: `"rounds=3 privacy=example"`, or a list of such overrides.

    Raises:
        AntherError: one of them is refused.
    """
    words = _split(overrides)
    refuse_other_data(words)
    composed: SimulationConfig = _compose("simulate", SimulationConfig, words)
    return composed


def compose_federation(overrides: str | Sequence[str]) -> FederationConfig:
    """Compose `conf/federation.yaml`, the settings of a server's run, with overrides as on a command line.

    Args:
        overrides: as for `compose`.

    Raises:
        AntherError: one of them is refused, such as a key that only a simulation uses.
    """
    words = _split(overrides)
    refuse_simulation_keys(words)
    composed: FederationConfig = _compose("federation", FederationConfig, words)
    return composed


def compose_stored_federation(overrides: str | Sequence[str]) -> FederationConfig:
    """Compose the stored overrides of a server's run, also those of a version whose servers took a simulation's keys.

    Args:
        overrides: as for `compose`.

    Raises:
        AntherError: one of them is refused by a simulation too.
    """
    words = federation_words(_split(overrides))
    try:
        return compose_federation(words)
    except AntherError:  # a preset of simulations, for example
        old = compose([*words, "data.writers=1"])
    shared: dict[str, Any] = {part.name: getattr(old, part.name) for part in fields(FederationConfig)}
    data = ExpectedDataConfig(old.data.count(), old.data.train, old.data.validation)
    return FederationConfig(**{**shared, "data": data})


def _split(overrides: str | Sequence[str]) -> list[str]:
    try:
        return shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
    except ValueError as error:
        raise AntherError(f"overrides={overrides}: {error}") from error


def _compose(name: str, schema: type, words: list[str]) -> Any:
    """Compose `conf/<name>.yaml`, with errors in one line."""
    refuse_renamed(words, SIMULATE)
    refuse_wrong_selections(words)
    offer_plugins(words)
    words = prepare_overrides(words, schema)
    try:
        with initialize_config_module("conf", version_base="1.3"):
            config = hydra.compose(name, overrides=words)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:  # ValueError: `group=null`
        raise AntherError(explain(error, known_keys(schema), SIMULATE)) from error
    return to_object(config, schema, SIMULATE)
