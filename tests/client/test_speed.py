"""What a device that was measured says of its speed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from client import plan, speed
from client.benchmark import write
from client.device import EXAMPLES_PER_SECOND_PER_CORE, WATTS, probe
from client.ladder import pass_seconds
from client.store import Store
from conf.errors import AntherError
from conf.planning import DeviceProfile, device_profile
from models.base import Base
from models.families.known import find
from models.footprint import example, footprint, stand_in
from privacy.storage import Files


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    return tmp_path


def benchmark(home: Path, **changes: object) -> DeviceProfile:
    """As if it had run here and found a laptop."""
    found = dataclasses.replace(device_profile("laptop"), **changes)
    write(found, home / plan.PROFILE, like="laptop")
    return found


@pytest.mark.usefixtures("home")
def test_a_device_that_was_not_measured(base: Base) -> None:
    assert speed.benchmarked(base) is None
    report = probe("d", base, {})
    assert report.watts == WATTS
    assert report.examples_per_second % EXAMPLES_PER_SECOND_PER_CORE == 0
    assert report.battery_wh is None
    assert speed.PROFILE == plan.PROFILE


def test_rates_are_those_that_the_plan_predicts(base: Base, home: Path) -> None:
    found = benchmark(home)
    predicted = footprint(stand_in(base), *example(find(str(base.folder)), base.resolution), rank=speed.RANK)
    report = probe("d", base, {})
    assert report.examples_per_second == pytest.approx(1 / pass_seconds(predicted, found))
    assert (report.watts, report.battery_wh) == (found.watts_busy, found.battery_wh)


def test_what_is_stated_goes_over_what_was_measured(base: Base, home: Path) -> None:
    benchmark(home)
    report = probe("d", base, {"examples-per-second": "3", "watts": "4"})
    assert (report.examples_per_second, report.watts) == (3.0, 4.0)


def test_it_is_predicted_once_for_a_profile(base: Base, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark(home)
    store = Store(Files(home / "store"))
    first = speed.benchmarked(base, store)
    with monkeypatch.context() as patched:
        patched.setattr(speed, "footprint", lambda *_, **__: pytest.fail("predicted again"))
        assert speed.benchmarked(base, store) == first
    benchmark(home, slowdown=2.0)
    slower = speed.benchmarked(base, store)
    assert first is not None
    assert slower is not None
    assert slower.examples_per_second == pytest.approx(first.examples_per_second / 2)


def test_a_profile_that_is_damaged_is_told(base: Base, home: Path) -> None:
    (home / plan.PROFILE).write_text("name: [")
    with pytest.raises(AntherError, match="device"):
        speed.benchmarked(base)
