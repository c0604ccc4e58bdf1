"""`anther device benchmark` writes a profile that `device=this` reads; its rates are work over time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.cli import benchmark
from client.cli.plan import PROFILE
from client.planning.plan_search import pass_seconds
from common.errors import AntherError
from conf.schemas.planning import DeviceProfileConfig, compose_plan
from tests.helpers.networks import SMALL


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step of negligible duration."""
    monkeypatch.setattr(benchmark, "STEP", SMALL["unet"])
    monkeypatch.setattr(benchmark, "PIXELS", 128)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Make every piece of work take the same time by the clock."""

    class _FakeClock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    result = _FakeClock()
    monkeypatch.setattr(benchmark, "time", result)

    def take(seconds: float) -> None:
        result.now += seconds

    return take


def test_second_half_is_averaged(clock: Callable[[float], None]) -> None:
    takes = iter([9.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert benchmark.mean_seconds(lambda: clock(next(takes)), 20.0) == 2.0
    slow = iter([30.0, 40.0])
    assert benchmark.mean_seconds(lambda: clock(next(slow)), 20.0) == 40.0  # however slow, one run is measured


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    def once(work: Callable[[], object], seconds: float) -> float:
        done.append(work())
        return seconds

    monkeypatch.setattr(benchmark, "mean_seconds", once)
    assert benchmark.matrix_rate(2.0, n=10) == 2 * 10**3 / 2
    assert benchmark.convolution_rate(4.0, channels=3, side=5) == 2 * 9 * 3 * 3 * 25 / 4
    assert benchmark.bandwidth(0.5, numbers=100) == 2 * 400 / 0.5
    assert [tuple(result.shape) for result in done if isinstance(result, torch.Tensor)] == [
        (10, 10),
        (1, 3, 5, 5),
        (100,),
    ]


@pytest.mark.integration
def test_profile_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    assert benchmark.main(["--like", "pixel8", "--seconds", "0.2"]) == 0
    assert "anther device plan device=this" in capsys.readouterr().out
    own, like = compose_plan([], tmp_path / "home" / PROFILE).device, compose_plan(["device=pixel8"], tmp_path).device
    assert (own.watts_busy, own.watts_idle, own.battery_wh) == (like.watts_busy, like.watts_idle, like.battery_wh)
    assert own.name != like.name
    for key in ("memory_gib", "runtime_mib", "matrix_gflops", "convolution_gflops", "bandwidth_gbs"):
        assert getattr(own, key) > 0
    assert [path.name for path in (tmp_path / "home").iterdir()] == [PROFILE]
    header = (tmp_path / "home" / PROFILE).read_text().splitlines()[:2]
    assert "measured by" in header[0]
    assert "pixel8" in header[1]


@pytest.mark.integration
def test_slowdown_is_measured_over_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "training_step", lambda _: (0.05, 300 * 2**20))
    monkeypatch.setattr(benchmark, "matrix_rate", lambda _: 20e9)
    monkeypatch.setattr(benchmark, "convolution_rate", lambda _: 10e9)
    monkeypatch.setattr(benchmark, "bandwidth", lambda _: 4e9)
    like = compose_plan(["device=pixel8"], Path("/nowhere")).device
    profile: DeviceProfileConfig = benchmark.measure(like, 1.0)
    assert pass_seconds(benchmark.predicted_step(), profile) == pytest.approx(0.05)
    assert (profile.matrix_gflops, profile.convolution_gflops, profile.bandwidth_gbs) == (20, 10, 4)
    assert profile.runtime_mib == 300


@pytest.mark.integration
def test_busy_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "training_step", lambda _: (9e9, 300 * 2**20))
    with pytest.raises(AntherError, match=r"device\.slowdown=.*the device was probably busy"):
        benchmark.measure(compose_plan(["device=pixel8"], Path("/nowhere")).device, 0.01)


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(benchmark, "measure", lambda like, _: like)
    for words in (["--seconds", "0"], []):
        assert benchmark.main(words) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
