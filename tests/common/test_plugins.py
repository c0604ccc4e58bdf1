"""Registries find built-in components, installed packages and import paths; devices load allowed plug-ins only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import AntherError
from common.plugins import Registry, allow_plugins
from tests.helpers.packages import install

MODULE = "anther_test_plugin"
SOURCE = """
class Installed:
    def __init__(self, *, size, factor=2.0):
        self.size, self.factor = size, factor
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    allow_plugins(())
    yield
    allow_plugins(())
    sys.modules.pop(MODULE, None)


def registry(*, on_device: bool = False) -> Registry[Any]:
    """Make an axis with one registered component, whose name determines one of its arguments."""
    axis: Registry[Any] = Registry("test_axis", key="axis.name", modules="common", on_device=on_device)
    axis.register("dict", one=1)(dict)
    return axis


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    entry = {"anther.test_axis installed": f"{MODULE}:Installed"}
    install(monkeypatch, folder, module=MODULE, source=SOURCE, entry_points=entry)


def test_built_in_components_register_themselves() -> None:
    from strategies.aggregation import AGGREGATIONS
    from strategies.aggregation.fedit import FedIT

    assert AGGREGATIONS["fedit"] is AGGREGATIONS.lookup("fedit") is FedIT
    assert list(AGGREGATIONS) == sorted(AGGREGATIONS)
    with pytest.raises(ValueError, match="aggregation fedit: registered twice"):
        AGGREGATIONS.register("fedit")(object)


def test_entry_point_of_a_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    axis = registry()
    assert axis.names() == ["dict"]
    installed(monkeypatch, tmp_path)
    assert axis.names() == ["dict", "installed"]
    assert MODULE not in sys.modules  # a listing imports nothing
    component = axis.create("installed", {"size": 3, "seed": 0})
    assert (component.size, component.factor) == (3, 2.0)
    with pytest.raises(AntherError, match=r"axis\.name=installed: it requires size; available are seed$"):
        axis.create("installed", {"seed": 0})
    with pytest.raises(AntherError, match=r"^axis\.name=lion: nothing is registered .* known are dict, installed$"):
        axis.lookup("lion")


def test_name_of_two_packages_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch, tmp_path / "one")
    entry = {"anther.test_axis installed": "other_plugin:Installed"}
    install(monkeypatch, tmp_path / "two", module="other_plugin", source=SOURCE, entry_points=entry)
    with pytest.raises(AntherError, match=r"axis\.name=installed: two installed packages provide it"):
        registry().lookup("installed")


def test_import_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert registry().lookup(f"{MODULE}:Installed").__name__ == "Installed"
    for path, reason in (
        ("nowhere_at_all:Rule", "No module named"),
        (f"{MODULE}:Missing", "has no attribute"),
        (f"{MODULE}:", "an import path is module:Class"),
    ):
        with pytest.raises(AntherError, match=f"^axis.name={path}: can't be imported .*{reason}"):
            registry().lookup(path)


def test_device_loads_allowed_entry_points_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch, tmp_path)
    axis = registry(on_device=True)
    assert axis.lookup("dict") is dict
    for name in ("installed", f"{MODULE}:Installed"):
        with pytest.raises(AntherError, match=r"nothing is registered under this name; known are dict$"):
            axis.lookup(name)
    assert MODULE not in sys.modules
    allow_plugins(["installed"])
    assert axis.lookup("installed").__name__ == "Installed"
    with pytest.raises(AntherError, match="nothing is registered"):  # still no import paths
        axis.lookup(f"{MODULE}:Installed")
    allow_plugins(())
    with pytest.raises(AntherError, match="nothing is registered"):
        axis.lookup("installed")
