"""Power meters of installed packages, and names that no meter has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.power.meter import METERS
from client.power.sensors import choose_sensors
from client.runtime.supervisor import check_meter
from common.errors import AntherError
from common.plugins import allow_plugins
from conf.schemas.node import NodeConfig, PowerConfig
from tests.helpers.packages import install
from tests.helpers.power_fakes import system

MODULE = "anther_test_meter"
SOURCE = """
from client.power.meter import EnergySource, PowerMeter


def make(system):
    return EnergySource(name="lab", covers="the bench", read=lambda: 7.0)


lab = PowerMeter(make=make, order=9, cuda=False, works=None, hint="")
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    allow_plugins(())
    yield
    allow_plugins(())
    sys.modules.pop(MODULE, None)


def test_unknown_meter_is_refused_at_the_start() -> None:
    assert list(METERS) == ["battery", "nvml", "pi5", "rapl", "termux"]
    with pytest.raises(AntherError, match=r"power\.meter=lion: must be one of: auto, none, file, battery, nvml, pi5, "):
        check_meter(NodeConfig(power=PowerConfig(meter="lion")))
    for name in ("auto", "none", "rapl"):
        check_meter(NodeConfig(power=PowerConfig(meter=name)))


def test_installed_meter_needs_permission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = {"anther.power_meter lab": f"{MODULE}:lab"}
    install(monkeypatch, tmp_path / "site", module=MODULE, source=SOURCE, entry_points=entry)
    power = PowerConfig(meter="lab")
    with pytest.raises(AntherError, match=r"power\.meter=lab: must be one of"):
        check_meter(NodeConfig(power=power))
    with pytest.raises(AntherError, match=r"power\.meter=anther_test_meter:lab: must be one of"):
        check_meter(NodeConfig(power=PowerConfig(meter=f"{MODULE}:lab"), plugins="lab"))
    assert MODULE not in sys.modules
    check_meter(NodeConfig(power=power, plugins="other, lab"))
    sensors = choose_sensors(power, system(tmp_path))
    assert sensors.source is not None
    assert (sensors.name, sensors.source.read()) == ("lab", 7.0)
