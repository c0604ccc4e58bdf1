"""Throughput of a device that was benchmarked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from client.cli import plan
from client.cli.benchmark import write
from client.device import EXAMPLES_PER_SECOND_PER_CORE, WATTS, build_report
from client.planning import throughput
from client.planning.plan_search import pass_seconds
from client.store.store import Store
from common.errors import AntherError
from conf.schemas.planning import DeviceProfileConfig, device_profile
from models.base.base import Base
from models.families.known import find_base
from models.footprint.footprint import copy_for_dry_run, example_shapes, footprint
from privacy.storage import FileStorage


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    return tmp_path


def benchmark(home: Path, **changes: object) -> DeviceProfileConfig:
    """Write the profile that the benchmark would write on a laptop."""
    result = dataclasses.replace(device_profile("laptop"), **changes)
    write(result, home / plan.PROFILE, like="laptop")
    return result


@pytest.mark.usefixtures("home")
def test_device_without_benchmark(base: Base) -> None:
    assert throughput.benchmarked(base) is None
    report = build_report("d", base, {})
    assert report.watts == WATTS
    assert report.examples_per_second % EXAMPLES_PER_SECOND_PER_CORE == 0
    assert report.battery_wh is None
    assert throughput.PROFILE == plan.PROFILE


@pytest.mark.integration
def test_rates_equal_the_plan(base: Base, home: Path) -> None:
    result = benchmark(home)
    predicted = footprint(
        copy_for_dry_run(base), *example_shapes(find_base(str(base.folder)), base.resolution), rank=throughput.RANK
    )
    report = build_report("d", base, {})
    assert report.examples_per_second == pytest.approx(1 / pass_seconds(predicted, result))
    assert (report.watts, report.battery_wh) == (result.watts_busy, result.battery_wh)


@pytest.mark.integration
def test_configuration_overrides_benchmark(base: Base, home: Path) -> None:
    benchmark(home)
    report = build_report("d", base, {"examples-per-second": "3", "watts": "4"})
    assert (report.examples_per_second, report.watts) == (3.0, 4.0)


@pytest.mark.integration
def test_prediction_is_cached_per_profile(base: Base, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark(home)
    store = Store(FileStorage(home / "store"))
    first = throughput.benchmarked(base, store)
    with monkeypatch.context() as patched:
        patched.setattr(throughput, "footprint", lambda *_, **__: pytest.fail("predicted again"))
        assert throughput.benchmarked(base, store) == first
    benchmark(home, slowdown=2.0)
    slower = throughput.benchmarked(base, store)
    assert first is not None
    assert slower is not None
    assert slower.examples_per_second == pytest.approx(first.examples_per_second / 2)


def test_damaged_profile_is_an_error(base: Base, home: Path) -> None:
    (home / plan.PROFILE).write_text("name: [")
    with pytest.raises(AntherError, match="device"):
        throughput.benchmarked(base)
