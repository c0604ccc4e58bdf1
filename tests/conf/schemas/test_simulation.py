"""The YAML groups match the schemas and each other."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from conf.cli import to_object
from conf.components import NAMED
from conf.explain import known_keys
from conf.schemas import simulation
from conf.schemas.fleet import ProfileConfig

GROUPS = Path(simulation.__file__).parents[1]
COMPONENTS = ("aggregation", "selection", "server_optimizer", "personalization")
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in GROUPS.glob("*/*.yaml")
    if path.parent.name != "device"  # of `anther plan`: test_planning
)

GROUP_NAMES = sorted({option.partition("=")[0] for option in OPTIONS})


def composed(*overrides: str) -> simulation.SimulationConfig:
    with initialize_config_module("conf", version_base="1.3"):
        config: simulation.SimulationConfig = to_object(
            compose("simulate", list(overrides)), simulation.SimulationConfig
        )
    return config


def together() -> list[tuple[str, ...]]:
    """Presets, and sets of options with one of each group: fewer than one for each option."""
    groups = {group: [option for option in OPTIONS if option.startswith(f"{group}=")] for group in GROUP_NAMES}
    presets = groups.pop("preset")
    return [(preset,) for preset in presets] + [
        tuple(option for option in options if option) for options in zip_longest(*groups.values())
    ]


@pytest.mark.integration
@pytest.mark.parametrize("options", together(), ids=" ".join)
def test_every_option_composes(options: tuple[str, ...]) -> None:
    needed = ["data.pictures=[photos]"] if "data=folder" in options else []
    needed += ["data.path=people.parquet"] if "data=people" in options else []
    needed += ["fleet=week"] if "round_loop=async" in options else []
    assert isinstance(composed(*options, *needed), simulation.SimulationConfig)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_shows_its_command(option: str) -> None:
    group, _, name = option.partition("=")
    header = (GROUPS / group / f"{name}.yaml").read_text().partition("\n\n")[0]
    word = f"{group}=[{name}]" if group == "robust" else option
    assert f"anther simulate {word}" in header


@pytest.mark.integration
def test_device_is_the_same_in_every_fleet() -> None:
    seen: dict[str, Any] = {}
    for path in sorted((GROUPS / "fleet").glob("*.yaml")):
        for profile in composed(f"fleet={path.stem}").fleet.profiles:
            assert seen.setdefault((profile.name, profile.device, profile.measured_on), profile) == profile, path.name
    assert {"pi4_4gb", "pi5_8gb", "pixel8", "iphone15", "laptop"} <= {name for name, _, measured in seen if measured}


def test_own_pictures_join_typeface_writers() -> None:
    data = composed("data=folder", "data.pictures=[photos]").data
    assert (data.pictures, data.writers) == (["photos"], 20)


@pytest.mark.integration
def test_known_keys_match_composed_keys() -> None:
    def flat(node: Any, prefix: str = "") -> list[str]:
        keys = []
        for key, value in node.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                keys += flat(value, f"{prefix}{key}.")
        return keys

    keys = flat(OmegaConf.to_container(OmegaConf.structured(simulation.SimulationConfig)))
    names = {f"{group}.name" for group in (*COMPONENTS, *NAMED)}  # set by `group=name`
    known = known_keys(simulation.SimulationConfig)
    assert [key for key in known if key not in options()] == [key for key in keys if key not in names]
    assert options() <= set(known)


def options() -> set[str]:
    """List the keys of all components, from their files."""
    keys = set()
    for group in (*COMPONENTS, "robust"):
        for path in (GROUPS / group).glob("*.yaml"):
            if "@package _global_" not in (text := path.read_text()):
                prefix = f"robust.{path.stem}" if group == "robust" else group
                keys |= {f"{prefix}.{key}" for key in set(yaml.safe_load(text)) - {"name", "defaults"}}
    return keys


def test_profile_values_are_checked() -> None:
    with pytest.raises(ValueError, match=r"watts=0 of toaster: must be over 0"):
        ProfileConfig(name="toaster", memory_gib=1, examples_per_second=1, watts=0, uplink_mbps=1, downlink_mbps=1)
