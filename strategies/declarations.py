"""Declarations of a component: the options that it has, and the components that it can't be combined with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import make_dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import AntherError


class Option(NamedTuple):
    """Configuration key that a parameter of a component's constructor is read from.

    A component declares its keys as `options = read_from(parameter=key, …)`. A key that is null keeps the parameter's
    default.
    """

    key: str
    convert: Callable[[Any], Any] | None = None
    """Converts the value of the key to the argument."""
    unless: str | None = None
    """Key that replaces this one if it is set."""
    otherwise: str | None = None
    """Key whose value the other components of the axis use instead; this key may then repeat it."""


class Conflict(NamedTuple):
    """Components of another axis with which a component, which has this in `conflicts`, can't run."""

    axis: str
    """The other axis, as in `strategies.registry.AXES`."""
    reason: str
    """Reason and remedy; `{name}` is the other component."""
    trait: str | None = None
    """Attribute of the other components that is true; None: every component of the axis."""

    def applies(self, axis: str, component: object) -> bool:
        """Return whether a component of another axis is meant."""
        return axis == self.axis and (self.trait is None or bool(getattr(component, self.trait, False)))


def read_from(**keys: str | Option) -> Mapping[str, Option]:
    """Return the options of a component: the configuration key of each parameter of its constructor."""
    return MappingProxyType({name: Option(key) if isinstance(key, str) else key for name, key in keys.items()})


def options_of(component: object) -> Mapping[str, Option]:
    """Return the declared options of a component, by parameter name."""
    declared: Mapping[str, Option] = getattr(component, "options", {})
    return declared


def conflicts_of(component: object) -> tuple[Conflict, ...]:
    """Return the declared conflicts of a component."""
    declared: tuple[Conflict, ...] = getattr(component, "conflicts", ())
    return declared


def value_at(config: object, key: str) -> Any:
    """Return the value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def option_values(component: object, config: object) -> dict[str, Any]:
    """Return the arguments that the declared options of a component have in a configuration; null ones are left out."""
    return dict(_values(component, config))


def own_options(component: Any, given: Mapping[str, Any], *, key: str, known: Collection[str]) -> dict[str, Any]:
    """Return the arguments for a component's own options, of the types that its constructor declares.

    Args:
        component: class of the component.
        given: values by name of the parameter.
        key: configuration key of the values.
        known: parameters with another source.

    Raises:
        AntherError: it has no such option, or a value has another type.
    """
    if not given:
        return {}
    taken = {*known, *options_of(component)}
    names = [name for name in inspect.signature(component).parameters if name not in taken]
    for name in given:
        if name not in names:
            raise AntherError(f"{key}.{name}: no such option; known are {', '.join(names) or 'none'}")
    types = get_type_hints(component.__init__)
    values = {}
    for name, value in given.items():
        schema = make_dataclass("Option", [(name, types.get(name, Any))])
        try:
            values[name] = getattr(
                OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), {name: value})), name
            )
        except OmegaConfBaseException as error:
            raise AntherError(f"{key}.{name}={value}: must be {inspect.formatannotation(types[name])}") from error
    return values


def missing_option(component: Any, config: object) -> str | None:
    """Return the first key that a component needs and that is null; None if it has all."""
    parameters = inspect.signature(component).parameters
    for name, option in options_of(component).items():
        if parameters[name].default is inspect.Parameter.empty and value_at(config, option.key) is None:
            return option.key
    return None


def _values(component: object, config: object) -> Iterator[tuple[str, Any]]:
    for parameter, option in options_of(component).items():
        if (value := value_at(config, option.key)) is not None:
            yield parameter, value if option.convert is None else option.convert(value)
