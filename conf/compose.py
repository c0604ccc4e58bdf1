"""A simulation's configuration from the one string that Flower's run configuration has room for."""

from __future__ import annotations

import shlex

import hydra
from hydra import initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.cli import to_object
from conf.errors import AntherError
from conf.explain import explain, known_keys
from conf.schemas import Simulation


def compose(overrides: str) -> Simulation:
    """`conf/simulate.yaml` with overrides as on a command line, `rounds=3 privacy=example`; AntherError if refused."""
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        raise AntherError(f"overrides={overrides}: {error}") from error
    try:
        with initialize_config_module("conf", version_base="1.3"):
            config = hydra.compose("simulate", overrides=words)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:  # ValueError: `group=null`
        raise AntherError(explain(error, known_keys(Simulation))) from error
    found: Simulation = to_object(config, Simulation)
    return found
