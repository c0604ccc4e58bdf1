"""Import one class of diffusers without the dozens of networks beside it.

`diffusers.UNet2DConditionModel` is lazy, but the packages around its module aren't: `diffusers.models.transformers`
imports every network that it has, `transformers.models` reads the source of all of its models to list their names, and
diffusers' schedulers import `scipy.stats` for one noise schedule. These packages run here when they are first used.
Until then they stand in `sys.modules` as modules with their own name and path, so that their submodules can be
imported; the first access to anything else runs their `__init__.py` in place. Every later import of them therefore
works as usual.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

from common.imports import collection_paused

SUBMODULES_ONLY = (
    "diffusers.hooks",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "diffusers.models.autoencoders",
    "transformers.models",
)
"""Packages whose submodules don't need them: they import each other, and nothing from the package."""

WHOLE = ("scipy.stats",)
"""Packages that run before their first submodule does, as usual."""


class _Deferred(ModuleType):
    """Module whose code has not run yet."""

    def __getattr__(self, name: str) -> Any:
        state = vars(self)
        with state["_deferred_lock"]:  # another thread waits until all names are defined
            if not state["_deferred_run"]:
                state["_deferred_run"] = True
                spec: Any = self.__spec__
                self.__path__ = spec.submodule_search_locations
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    state["_deferred_run"] = False  # the next access raises the same error, not an AttributeError
                    raise
                if sys.modules[self.__name__] is self:
                    self.__class__ = ModuleType  # type: ignore[assignment]
                else:
                    _link(sys.modules[self.__name__])
        if (module := sys.modules[self.__name__]) is not self:  # replaced itself, as transformers' packages do
            return getattr(module, name)
        try:
            return state[name]
        except KeyError:
            return ModuleType.__getattribute__(self, name)  # the package's own __getattr__, or an AttributeError


def diffusers_class(name: str, package: str = "diffusers") -> Any:
    """Return the class of this name in diffusers, or in one package of it; AttributeError if it has none."""
    with collection_paused():
        import diffusers.models  # noqa: F401  # slow import, so only here

        for eager in SUBMODULES_ONLY:
            _defer(eager, submodules=True)
        for eager in WHOLE:
            _defer(eager, submodules=False)
        return getattr(importlib.import_module(package), name)


def _defer(name: str, *, submodules: bool) -> None:
    """Put a package into `sys.modules` without running it, unless it has run or doesn't exist."""
    if name in sys.modules:
        return
    try:
        spec = importlib.util.find_spec(name)  # imports the parents
    except ModuleNotFoundError:  # scipy is not a requirement of diffusers
        return
    if spec is None:  # another release of the library
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Deferred
    vars(module).update(_deferred_lock=threading.RLock(), _deferred_run=False)
    if not submodules:
        del module.__path__  # importing a submodule asks for it, and so runs the package first
    sys.modules[name] = module
    _link(module)


def _link(module: ModuleType) -> None:
    """Make a module an attribute of its parent, as an import does."""
    parent, _, child = module.__name__.rpartition(".")
    setattr(sys.modules[parent], child, module)
