"""Components of a strategy that a Hydra group selects, with options of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

GROUPS = ("aggregation", "selection", "server_optimizer", "personalization")
"""Groups that select one component each: keys of the configuration, folders of YAML files, and axes of plug-ins."""
ROBUST = "robust"
"""Group that selects any number of components; each has a group of keys of its own, such as `robust.krum`."""


NAMED = ("planning", "round_loop", "grid")
"""Groups of typed keys, where each YAML file has the `name` of a choice."""


@dataclass(frozen=True)
class ComponentConfig:
    """Name and options of the component that a group selects."""

    name: str
    """Name of a built-in component, of an installed plug-in, or module:Class."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments by parameter of its constructor, which has their types and checks their values."""

    @classmethod
    def of(cls, settings: ComponentConfig | Mapping[str, Any]) -> ComponentConfig:
        """Return the component of a composed group: `name` and its options."""
        if isinstance(settings, ComponentConfig):
            return settings
        return cls(settings["name"], {key: value for key, value in settings.items() if key != "name"})


if TYPE_CHECKING:
    Component = ComponentConfig
    RobustRules = Mapping[str, Mapping[str, Any]]
else:  # as Hydra composes it; the configuration converts it in `__post_init__`
    Component = RobustRules = dict[str, Any]


def not_composed() -> Any:
    """Return the default of a `Component`, which Hydra replaces."""
    return {"name": MISSING}


def robust_rules(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the options of the rules of a composed group `robust`, by name in the order of selection.

    Raises:
        ValueError: a rule has no keys.
    """
    for key, rule in settings.items():
        if not isinstance(rule, Mapping):
            raise ValueError(f"robust.{key}={rule}: is a group of keys, not a value")
    named = {rule.get("name", key): rule for key, rule in settings.items()}
    return {name: {key: value for key, value in rule.items() if key != "name"} for name, rule in named.items()}


def as_settings(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dictionaries, in which a component is its name and its options.

    Args:
        config: instance of a schema of `conf.schemas`.
    """
    settings = dataclasses.asdict(config)
    for group in GROUPS:
        if isinstance(getattr(config, group, None), ComponentConfig):
            settings[group] = {"name": settings[group]["name"], **settings[group]["options"]}
    return settings
