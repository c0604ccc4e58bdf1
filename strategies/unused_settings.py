"""Refuse settings that have no effect in a configuration, since a user who sets one expects an effect.

The settings of components follow from their declared `options`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from common.errors import AntherError
from common.plugins import Registry
from conf.schemas.federation import FederationConfig
from strategies.aggregation import AGGREGATIONS
from strategies.declarations import Option, options_of, value_at
from strategies.robust import ROBUST_RULES
from strategies.selection import SELECTIONS
from strategies.server_optimizers import OPTIMIZERS


def refuse_unused(config: FederationConfig) -> None:
    """Raise AntherError with one line for the first unused setting."""
    selection = [config.selection.name] if config.cohort.size is not None else []
    for registry, names, group, named in (
        (AGGREGATIONS, [config.aggregation.name], "aggregation", "aggregation={}"),
        (ROBUST_RULES, config.robust.rules, "robust", "{} (robust.rules)"),
        (OPTIMIZERS, [config.server_optimizer.name], "server_optimizer", "server_optimizer.name={}"),
        (SELECTIONS, selection, "selection", "selection={}"),
    ):
        _refuse_options(config, registry, names, group=group, named=named)
    overlap = config.round_loop.mode == "async"
    for key in ("round_loop.buffer_size", "round_loop.concurrency"):
        if (value := value_at(config, key)) is not None and not overlap:
            raise AntherError(f"{key}={value}: only used by round_loop.mode=async; remove it")


def _refuse_options(
    config: FederationConfig, registry: Registry[object], names: list[str], *, group: str, named: str
) -> None:
    """Refuse options of an axis that none of its selected components has.

    Args:
        config: configuration of the run.
        registry: components of the axis.
        names: names of the selected ones.
        group: group of keys of the axis.
        named: how a message refers to components of the axis.

    Raises:
        AntherError: an option has no effect.
    """
    used = {option.key: option for name in names for option in options_of(registry.lookup(name)).values()}
    for key, users in _users(registry, group).items():
        value, option = value_at(config, key), used.get(key)
        if value is None or value == _default(config, key):
            continue
        shown = f"{key}={value:g}" if isinstance(value, int | float) else f"{key}={value}"
        shown = key if hasattr(value, "__dataclass_fields__") else shown
        by = named.format(_listed(list(users)))
        if option and option.unless and value_at(config, option.unless) is not None:
            raise AntherError(f"{shown}: only used by {by} without {option.unless}; remove it")
        if option:
            continue
        others = next((one.otherwise for one in users.values() if one.otherwise), None)
        if others is None:
            raise AntherError(f"{shown}: only used by {by}; remove it")
        if value != value_at(config, others):
            raise AntherError(
                f"{shown}: only used by {by}; {_listed(names)} uses {others}={value_at(config, others)}; remove it"
            )


def _users(registry: Registry[object], group: str) -> Mapping[str, Mapping[str, Option]]:
    """Return the options of all registered components, by key and name; without keys outside of the group."""
    users: dict[str, dict[str, Option]] = {}
    for key, name, option in _options(registry):
        if key.startswith(f"{group}."):
            users.setdefault(key, {})[name] = option
    return users


def _options(registry: Registry[object]) -> Iterator[tuple[str, str, Option]]:
    for name, component in registry.items():
        for option in options_of(component).values():
            yield option.key, name, option


def _default(config: FederationConfig, key: str) -> object:
    """Return the default value of a key in a group."""
    group, _, name = key.rpartition(".")
    return value_at(type(value_at(config, group))(), name)


def _listed(names: list[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
