"""Registries of plug-ins: the components of one axis by name, e.g. aggregation rules.

A component registers itself where it is defined, as `@aggregation("fedit")`. The modules of an axis are imported when
one of its components is needed. A component outside of this repository is found in three ways:

- an installed package declares it as an entry point in the group `anther.<axis>`;
- on the server and in simulations, a name `module:Class` is an import path;
- tests and notebooks register it with the decorator.

Devices load nothing that a message names: no import paths, and only entry points that the owner's configuration lists.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from common.errors import AntherError, shorten, summary

T = TypeVar("T")
Component = TypeVar("Component")

_allowed: set[str] | None = set()


def allow_plugins(names: Iterable[str]) -> None:
    """Set the entry points that this process may load on axes of devices; by default none.

    Args:
        names: their names, from the configuration of the device's owner.
    """
    global _allowed
    _allowed = set(names)


def allow_installed_plugins() -> None:
    """Allow all entry points on axes of devices, in a process that is no device: a server, a simulation, a command."""
    global _allowed
    _allowed = None


class Registry(MutableMapping[str, T], Generic[T]):
    """Components of one axis by name.

    As a mapping it has the components that are registered in this process. `names` also has the installed ones.

    Args:
        axis: name of the axis; installed packages use the group `anther.<axis>` of entry points.
        key: configuration key that names a component.
        modules: module or package whose modules register the built-in components.
        on_device: whether devices use the axis.
    """

    def __init__(self, axis: str, *, key: str, modules: str, on_device: bool = False) -> None:
        self.axis, self.key = axis, key
        self._modules, self._on_device = modules, on_device
        self._components: dict[str, T] = {}
        self._fixed: dict[str, dict[str, Any]] = {}
        self._loaded = False

    def register(self, name: str, **fixed: Any) -> Callable[[Component], Component]:
        """Return a decorator that registers a component.

        Args:
            name: name of the component; each name is registered once.
            fixed: arguments of its constructor that this name determines.
        """

        def decorate(component: Component) -> Component:
            if self._components.get(name, component) is not component:
                raise ValueError(f"{self.axis} {name}: registered twice")
            self._components[name] = component  # type: ignore[assignment]  # the axis' protocol, which mypy can't infer
            self._fixed[name] = fixed
            return component

        return decorate

    def names(self) -> list[str]:
        """Return the names of all components that can be used here, without importing installed packages."""
        return [*self, *(name for name in self._entry_points() if name not in self)]

    def lookup(self, name: str) -> T:
        """Return the component of a name, and import it if necessary.

        Raises:
            AntherError: no component has this name, or it can't be imported. There is no fallback.
        """
        if name in self:
            return self[name]
        points = self._entry_points()
        if name in points:
            return self._imported(name, points[name].load)
        if ":" in name and not self._on_device:
            return self._imported(name, lambda: _from_path(name))
        raise AntherError(
            f"{self.key}={shorten(name)}: nothing is registered under this name; known are {', '.join(self.names())}"
        )

    def fixed(self, name: str) -> Mapping[str, Any]:
        """Return the arguments of a component's constructor that its name determines."""
        return self._fixed.get(name, {})

    def create(self, name: str, settings: Mapping[str, Any]) -> Any:
        """Create a component with those settings that it accepts.

        Args:
            name: its name.
            settings: available settings by parameter name.

        Raises:
            AntherError: it is not registered, or requires a setting that is not available.
        """
        component: Any = self.lookup(name)
        available = {**settings, **self.fixed(name)}
        parameters = inspect.signature(component).parameters.values()
        if missing := [one.name for one in parameters if one.default is one.empty and one.name not in available]:
            raise AntherError(
                f"{self.key}={name}: it requires {', '.join(missing)}; available are {', '.join(settings)}"
            )
        return component(**{one.name: available[one.name] for one in parameters if one.name in available})

    def __getitem__(self, name: str) -> T:
        return self._builtin()[name]

    def __setitem__(self, name: str, component: T) -> None:
        self._builtin()[name] = component

    def __delitem__(self, name: str) -> None:
        del self._builtin()[name]
        self._fixed.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._builtin()))  # modules may be imported in any order

    def __len__(self) -> int:
        return len(self._builtin())

    def _builtin(self) -> dict[str, T]:
        """Return the registered components, after importing the modules of the axis."""
        if not self._loaded:
            self._loaded = True  # first, because a module may look up another component while it is imported
            root = importlib.import_module(self._modules)
            for module in pkgutil.iter_modules(getattr(root, "__path__", ()), f"{self._modules}."):
                importlib.import_module(module.name)
        return self._components

    def _entry_points(self) -> dict[str, EntryPoint]:
        """Return the entry points of installed packages that may be used, by name; built-in names are not replaced."""
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=f"anther.{self.axis}"):
            if self._on_device and _allowed is not None and point.name not in _allowed:
                continue
            if point.value != found.setdefault(point.name, point).value:
                raise AntherError(
                    f"{self.key}={shorten(point.name)}: two installed packages provide it ({_package(point)} and "
                    f"{_package(found[point.name])}); remove one of them"
                )
        return found

    def _imported(self, name: str, load: Callable[[], Any]) -> T:
        """Import a component from outside of this repository."""
        try:
            component: T = load()
        except (ImportError, AttributeError, SyntaxError) as error:
            raise AntherError(f"{self.key}={shorten(name)}: can't be imported ({summary(error)})") from error
        return component


def _from_path(path: str) -> Any:
    """Import `module:Class`."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ImportError("an import path is module:Class")
    return getattr(importlib.import_module(module), attribute)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
