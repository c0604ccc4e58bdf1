"""Declarations of a component: the options that it has, and the components that it can't be combined with.

The options of a component are the parameters of its constructor: their types are checked here, their values by the
constructor, which raises `ValueError("option=value: must be …")`. A parameter whose type is a dataclass stands for one
option per field.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, make_dataclass
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import AntherError
from common.plugins import Registry


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


def conflicts_of(component: object) -> tuple[Conflict, ...]:
    """Return the declared conflicts of a component."""
    declared: tuple[Conflict, ...] = getattr(component, "conflicts", ())
    return declared


def create(
    registry: Registry[Any], name: str, options: Mapping[str, Any], *, key: str, known: Mapping[str, Any] | None = None
) -> Any:
    """Create a component.

    Args:
        registry: components of its axis.
        name: its name.
        options: its configured options.
        key: configuration key of the options, for messages.
        known: values from elsewhere in the configuration, by the names that constructors use for them.

    Raises:
        AntherError: it is not registered, has no such option, or refuses a value.
    """
    known = known or {}
    component = registry.lookup(name)
    parameters = _parameters(component, {*known, *registry.fixed(name)})
    types = {option: kind for parameter in parameters for option, kind in parameter.options.items()}
    for option in options:
        if option not in types:
            raise AntherError(f"{key}.{option}: no option of {name}, which has {', '.join(types) or 'none'}")
    values = {option: _typed(f"{key}.{option}", types[option], value) for option, value in options.items()}
    try:
        own = dict(_arguments(parameters, values, key=key, name=name))
        return registry.create(name, {**known, **own})
    except ValueError as error:  # of its constructor
        separator = "." if str(error).partition("=")[0] in types else ": "
        raise AntherError(f"{key}{separator}{error}") from error


class _Parameter(NamedTuple):
    """Parameter of a constructor that is configured."""

    name: str
    kind: Any
    options: Mapping[str, Any]
    """Types of its options by name: itself, or the fields of a dataclass."""
    required: bool


def _parameters(component: Any, taken: Collection[str]) -> list[_Parameter]:
    """Return the parameters of a component's constructor that are configured.

    Args:
        component: class of the component, or a function that makes it.
        taken: parameters with another source.
    """
    function = component.__init__ if isinstance(component, type) else component  # type: ignore[misc]
    hints = _hints(function)
    found = []
    for name, parameter in inspect.signature(component).parameters.items():
        kind = hints.get(name, Any)
        if name not in taken and get_origin(kind) is not Callable:
            options = _hints(kind) if is_dataclass(kind) else {name: kind}
            found.append(_Parameter(name, kind, options, parameter.default is parameter.empty))
    return found


def _hints(function_or_class: Any) -> dict[str, Any]:
    """Return its type hints; none if they name something that isn't imported at run time."""
    try:
        return get_type_hints(function_or_class)
    except NameError:
        return {}


def _arguments(
    parameters: Sequence[_Parameter], values: Mapping[str, Any], *, key: str, name: str
) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a component's constructor.

    Args:
        parameters: configured parameters.
        values: configured options.
        key: configuration key of the options, for messages.
        name: name of the component, for messages.

    Raises:
        AntherError: a required option has no value.
    """
    for parameter in parameters:
        if is_dataclass(parameter.kind):
            own = {option: values[option] for option in parameter.options if option in values}
            yield parameter.name, parameter.kind(**own)  # type: ignore[operator]  # a class
        elif parameter.name in values:
            yield parameter.name, values[parameter.name]
        elif parameter.required:
            raise AntherError(f"{key}.{parameter.name}: {name} needs a value")


def _typed(key: str, kind: Any, value: Any) -> Any:
    """Convert a value to the type of its option; AntherError if it has another one."""
    schema = make_dataclass("Option", [("value", kind)])
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), {"value": value})).value  # type: ignore[union-attr]
    except OmegaConfBaseException as error:
        kinds = get_args(kind) or (kind,)
        names = [_KINDS.get(one, inspect.formatannotation(one)) for one in kinds if one is not NoneType]
        null = ["null"] if NoneType in kinds else []
        shown = "null" if value is None else value
        raise AntherError(f"{key}={shown}: must be {', or '.join([*names, *null])}") from error


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
