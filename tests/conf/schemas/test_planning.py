"""Device profiles are valid and state their sources; mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import AntherError
from conf.schemas.planning import DEVICES, DeviceProfileConfig, PlanConfig, compose_plan, devices

NOWHERE = Path("/nowhere/device.yaml")
KEYS = ["memory_gib", "runtime_mib", "matrix_gflops", "bandwidth_gbs", "watts_idle", "watts_busy"]
GOOD = {
    "name": "toaster",
    "memory_gib": 2.0,
    "runtime_mib": 450.0,
    "matrix_gflops": 20.0,
    "convolution_gflops": 10.0,
    "bandwidth_gbs": 4.0,
    "watts_idle": 2.0,
    "watts_busy": 6.0,
}


def test_built_in_devices() -> None:
    boards = {"pi4_2gb", "pi4_4gb", "pi4_8gb", "pi5_4gb", "pi5_8gb", "jetson_orin_nano"}
    assert set(devices()) == boards | {"android_midrange", "pixel8", "iphone15", "laptop"}


@pytest.mark.parametrize("name", devices())
def test_profiles_are_valid_and_state_sources(name: str) -> None:
    plan = compose_plan([f"device={name}"], NOWHERE)
    assert plan.device.name == name
    assert (plan.device.battery_wh is None) == name.startswith(("pi", "jetson")) or name == "pixel8"
    lines = (DEVICES / f"{name}.yaml").read_text().splitlines()
    assert f"anther plan device={name}" in lines[0]
    assert any("estimate" in line for line in lines if line.startswith("#"))
    for key in KEYS:
        assert any(line.startswith(f"{key}: ") and "  # " in line for line in lines), key


def test_boards_of_one_kind_differ_only_in_memory() -> None:
    for kind in ("pi4", "pi5"):
        profiles = [compose_plan([f"device={name}"], NOWHERE).device for name in devices() if name.startswith(kind)]
        assert len({(profile.matrix_gflops, profile.bandwidth_gbs, profile.watts_busy) for profile in profiles}) == 1
        assert len({profile.memory_gib for profile in profiles}) == len(profiles)


def test_words_override_profile() -> None:
    plan = compose_plan(
        ["device=pi5_8gb", "device.memory_gib=1.5", "rank=4", "base=sdxl", "device.battery_wh=20"], NOWHERE
    )
    assert (plan.base, plan.rank, plan.device.memory_gib, plan.device.battery_wh) == ("sdxl", 4, 1.5, 20)
    assert plan.device.name == "pi5_8gb"


def test_this_device_is_read_from_its_file(tmp_path: Path) -> None:
    own = tmp_path / "device.yaml"
    own.write_text("\n".join(f"{key}: {value}" for key, value in GOOD.items()))
    for words in ([], ["device=this"]):
        assert compose_plan(words, own).device.name == "toaster"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "device=this: not measured yet: run `anther device benchmark`, or name one of: android"),
        (["device=pi9"], "device=pi9: no such device: name one of: android"),
        (["device=../fleet/pis"], "no such device"),
        (["device=pixel8", "rnk=8"], "rnk: no such key; did you mean rank"),
        (["device=pixel8", "rank"], "rank: can't be read as key=value"),
        (["device=pixel8", "rank=x"], "rank: must be a whole number"),
        (["device=pixel8", "rank=0"], "rank=0: must be 1 or more"),
        (["device=pixel8", "steps=5"], "min_steps=20: must not be over steps=5"),
        (["device=pixel8", "max_hours=0"], "max_hours=0.0: must be over 0"),
        (["device=pixel8", "max_battery_fraction=2"], "max_battery_fraction=2.0: must be over 0 and at most 1"),
        (["device=pixel8", "alternatives=-1"], "alternatives=-1: must be 0 or more"),
        (["device=pixel8", "device.memory_gib=0"], "device.memory_gib=0.0: must be 0.1 to 4096"),
        (["device=pixel8", "device.watts_idle=9"], "device.watts_idle=9.0: must not be over watts_busy=3.5"),
        (["device=pixel8", "device.battery_wh=-1"], "device.battery_wh=-1.0: must be over 0, or null for none"),
        (["device=pixel8", "device.mem=1"], "device.mem: no such key"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(AntherError) as caught:
        compose_plan(words, NOWHERE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "name: [", "name: toaster", "nme: toaster", "- a"])
def test_damaged_profile_is_one_line(tmp_path: Path, text: str) -> None:
    own = tmp_path / "device.yaml"
    own.write_text(text)
    with pytest.raises(AntherError) as caught:
        compose_plan([], own)
    assert "\n" not in str(caught.value)


def test_schemas_check_values() -> None:
    assert DeviceProfileConfig(**GOOD).battery_wh is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slowdown=50"):
        DeviceProfileConfig(**{**GOOD, "slowdown": 50.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size=0"):
        PlanConfig(batch_size=0)
