"""A device built from its node's configuration."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from client.device import from_config
from client.power.conditions import Conditions
from common.errors import AntherError
from privacy.noise import SecureNoise, SimulatedNoise
from tests.helpers.devices import BASE, SITES

HELD: Any = SimpleNamespace(hash=BASE, sites=SITES, attention=r".*to_q", resolution=64)  # the attributes that are used


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create two owners with three pictures each."""
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    for owner in ("bob", "ann"):
        folder = tmp_path / "owners" / owner
        folder.mkdir(parents=True)
        lines = [f'{{"file_name": "{number}.png", "text": "{owner}"}}' for number in range(3)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        for number in range(3):
            Image.new("L", (8, 8)).save(folder / f"{number}.png")
    return tmp_path / "owners"


def test_real_device_uses_secure_noise_and_stored_seed(root: Path) -> None:
    device = from_config({"data": str(root / "ann"), "name": "tablet"}, HELD)
    assert device.name == device.report.device == "tablet"
    assert device.store.where == str(root.parent / "home/devices/tablet")
    assert device.pictures().train[0].caption == "ann"
    assert isinstance(device.noise(1, "shared"), SecureNoise)
    assert device.noise(1, "shared").release
    repeated = from_config({"data": str(root / "ann"), "name": "tablet", "seed": 3}, HELD)
    assert repeated.seed == device.seed  # random


@pytest.mark.parametrize("test", [True, "true"])
def test_declared_test_is_reproducible_and_no_release(root: Path, test: object) -> None:
    config = {"data": str(root / "ann"), "name": "tablet", "test": test, "seed": 3}
    device, repeated = (from_config(config, HELD) for _ in range(2))
    assert isinstance(device.noise(1, "shared"), SimulatedNoise)
    assert not device.noise(1, "shared").release
    assert device.seed == 3
    assert torch.equal(
        device.noise(1, "shared").rounded_gaussian(3, 1e9), repeated.noise(1, "shared").rounded_gaussian(3, 1e9)
    )


def test_simulated_owners_by_partition(root: Path) -> None:
    devices = [
        from_config({"data-root": str(root), "partition-id": number, "num-partitions": 2}, HELD) for number in range(2)
    ]
    assert [device.name for device in devices] == ["ann", "bob"]
    assert [device.pictures().test[0].caption for device in devices] == ["ann", "bob"]
    assert devices[0].store.where != devices[1].store.where


def test_report_is_coarse(root: Path, tmp_path: Path) -> None:
    stated = {"examples-per-second": "25", "watts": 6, "metered": "true", "store": str(tmp_path / "s")}
    device = from_config({"data": str(root / "ann")} | stated, HELD)
    report = device.report
    assert report.memory_gib == round(psutil.virtual_memory().total / 2**30)
    assert (report.base, report.examples_per_second, report.watts, report.metered) == (BASE, 25.0, 6.0, True)
    assert device.store.where == str(tmp_path / "s")
    assert (report.rank, report.sites) == (None, None)
    first, *_ = SITES
    limited = from_config({"data": str(root / "ann"), "rank": "2", "sites": f"^{first}$"}, HELD).report
    assert (limited.rank, limited.sites) == (2, (first,))
    named = from_config({"data": str(root / "ann"), "sites": "attention"}, HELD)
    assert named.report.sites == ("down.to_q",)
    assert named.named_sites == {"attention": {"down.to_q"}, "linear": set(SITES), "all": set(SITES)}


@pytest.mark.parametrize(
    ("now", "reported"),
    [
        (Conditions(), {}),
        (Conditions(battery=0.7999, charging=True), {"battery": 0.6, "charging": True}),
        (Conditions(battery=0.6, charging=False), {"battery": 0.6}),
        (Conditions(battery=1.0), {"battery": 1.0}),
        (Conditions(battery=0.05), {"battery": 0.0}),
        (Conditions(celsius=80.0, throttled=False), {}),
        (Conditions(celsius=80.1), {"hot": True}),
        (Conditions(battery_celsius=40.0), {}),
        (Conditions(battery_celsius=40.1), {"hot": True}),
        (Conditions(throttled=True), {"hot": True}),
        (Conditions(owner_active=True, metered=True), {"busy": True, "metered": True}),
        (Conditions(free_mib=12.3, watts=4.5, owner_active=False, metered=False), {}),  # not sent to the server
    ],
)
def test_report_rounds_sensor_readings(root: Path, now: Conditions, reported: dict[str, Any]) -> None:
    config = {"data": str(root / "ann"), "name": "tablet"}
    plain = from_config(config, HELD).report
    assert from_config(config, HELD, read=lambda: now).report == dataclasses.replace(plain, **reported)
    assert (plain.battery, plain.charging, plain.busy, plain.hot, plain.metered) == (None, False, False, False, False)


def test_configured_metered_overrides_sensors(root: Path) -> None:
    config = {"data": str(root / "ann"), "metered": True}
    assert from_config(config, HELD, read=lambda: Conditions(metered=False)).report.metered


def test_policy_is_loaded(root: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("max_epsilon = 2.5")
    device = from_config({"data": str(root / "ann"), "store": str(tmp_path)}, HELD)
    assert device.policy.max_epsilon == 2.5


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "data"),
        ({"partition-id": 0}, "data"),
        ({"data-root": ".", "partition-id": 99}, "partition 99"),
        ({"data": ".", "name": "../other"}, "name"),
        ({"data": ".", "test": "maybe"}, "test"),
        ({"data": ".", "watts": "many"}, "watts"),
        ({"data": ".", "watts": "nan"}, "watts"),
        ({"data": ".", "examples-per-second": 0}, "examples-per-second"),
        ({"data": ".", "test": True, "seed": -1}, "seed"),
        ({"data-root": ".", "partition-id": "x"}, "partition-id"),
        ({"data": ".", "sites": "nothing of"}, "sites"),
        ({"data": ".", "sites": "("}, "sites"),
        ({"data": ".", "rank": "low"}, "rank"),
    ],
)
@pytest.mark.usefixtures("root")
def test_errors_name_their_key(config: dict[str, object], named: str) -> None:
    with pytest.raises(AntherError, match=named) as raised:
        from_config(config, HELD)
    assert "\n" not in str(raised.value)


@pytest.mark.integration
def test_device_imports_neither_server_nor_flower() -> None:
    script = (
        "import sys, client.rounds.handler, client.device, client.rounds.scheduler\n"
        "heavy = {'flwr', 'diffusers', 'transformers', 'PIL', 'dp_accounting', 'psutil'}\n"
        "rooms = {'server', 'strategies', 'simulations', 'typefaces'}\n"
        "print(sorted((heavy | rooms) & {name.split('.')[0] for name in sys.modules}))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"
