"""One device: its report, store, policy and randomness."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from client.data import METADATA, WHITE, Pictures, load_folder
from client.paths import device_files
from client.planning import preflight, throughput
from client.power.conditions import Conditions
from client.power.meter import TrainingCost
from client.store.store import Store
from common.errors import AntherError
from models.base.base import Base
from models.diffusion.sites import named_sites, resolve_sites
from models.lora.adapter import Sites
from privacy import noise, policy
from privacy.noise import NoiseSource
from protocol.messages import DeviceReport
from training.variants import ALL_CAPTIONS, VariantOptions

log = logging.getLogger(__name__)

# Defaults for values that aren't configured: those of the slowest device of conf/fleet, so that no duration is
# underestimated.
EXAMPLES_PER_SECOND_PER_CORE = 6.0  # Raspberry Pi 4, glyph base: estimate, see conf/fleet/mixed.yaml
WATTS = 6.4  # Raspberry Pi 4, whole board
UPLINK_MBPS, DOWNLINK_MBPS = 8.0, 40.0  # mobile data
HOT, BATTERY_HOT = (
    80.0,
    40.0,
)  # °C, like `throttle.max_celsius` and `throttle.max_battery_celsius`: training pauses above them


def _no_wait(_: float) -> None:
    pass


def _no_limit(_: int, __: Collection[str], ___: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Device:
    """State and services of one device that `client.rounds.handler` uses."""

    name: str
    report: DeviceReport
    store: Store
    pictures: Callable[[], Pictures]
    """Read the owner's pictures when they are needed; raises AntherError if they can't be used."""
    sites: Sites
    """Sites of the device's base."""
    policy: policy.Policy
    noise: Callable[[int, str], NoiseSource]
    """Return the noise source of one round and purpose; the server cannot influence it."""
    seed: int
    """Seed of the non-private streams: ordinary batches, timesteps, diffusion noise."""
    resolution: int
    """Side in pixels of the base's pictures."""
    listed_pictures: Callable[[], Pictures] | None = None
    """Like `pictures`, for private jobs: each unusable picture is a `MissingPicture`, and the reason is logged for the
    owner. None: `pictures` is used.
    """
    wait: Callable[[float], None] = _no_wait
    """Wait this many seconds before a private reply, so that it is sent at a public time; raises Cancelled if the
    device is stopped meanwhile. A simulation only counts the time.
    """
    check_memory: Callable[[int, Collection[str], int], None] = _no_limit
    """Raise RequestRefusedError if training an adapter of this rank at these sites, and this number of further bytes,
    would not fit. In a simulation the cohort manages memory.
    """
    variants: VariantOptions = ALL_CAPTIONS
    """Examples of each picture in training without privacy."""
    previews: int = 0
    """Number of preview pictures drawn for the owner after each training of the personal adapter."""
    measured_cost: Callable[[], TrainingCost | None] | None = None
    """Metered cost of the last training; None: there is no meter, and costs are estimated."""
    named_sites: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Sites that each name means that a policy may allow (`models.diffusion.sites`); a name without sites allows none.
    """


def from_config(
    node_config: Mapping[str, Any],
    base: Base,
    *,
    store: Store | None = None,
    read: Callable[[], Conditions] | None = None,
    measured_cost: Callable[[], TrainingCost | None] | None = None,
    wait: Callable[[float], None] = _no_wait,
) -> Device:
    """Build the device that a SuperNode's configuration describes.

    Args:
        node_config: `data`, the folder of pictures, or else `data-root` and `partition-id`, which select its k-th
            sub-folder in a simulation. Optional: `background`, the color behind transparent pictures; `caption`, one
            for all pictures; `flip` and `caption-dropout`, see `NodeConfig`; `name`; `store`, a folder; `previews`, the
            number of pictures drawn into it after each personal training; `test=true`, which makes noise reproducible
            by `seed`, so that nothing counts as a release; for the report: `examples-per-second`, `watts`,
            `uplink-mbps`, `downlink-mbps`, `metered`; `rank` and `sites`, the highest rank and, as a name or a regular
            expression, the only layers to train.
        base: the device's base.
        store: an open store; None: open an unencrypted one.
        read: reads the sensors for the device's current state; None: the report does not include it.
        measured_cost: see `Device.measured_cost`.
        wait: see `Device.wait`.

    Raises:
        AntherError: a key is missing or its value can't be used.
    """
    pictures = _folder(node_config)
    default = pictures.name if "data" not in node_config else platform.node()
    name = str(node_config.get("name") or default or "device")
    if Path(name).name != name or name == "..":
        raise AntherError(f"name={name!r}: must not be a path; set another name in the node's configuration")
    files = device_files(name, node_config.get("store"))
    store = store or Store(files)
    is_test = _flag(node_config, "test")
    seed = non_negative_int(node_config, "seed") if is_test else store.seed()
    read_pictures = partial(
        load_folder,
        pictures,
        background=str(node_config.get("background", WHITE)),
        caption=None if (caption := node_config.get("caption")) is None else str(caption),
    )
    return Device(
        name=name,
        report=build_report(name, base, node_config, store=store, read=read),
        store=store,
        pictures=read_pictures,
        listed_pictures=partial(read_pictures, on_error=lambda mistake: log.error("%s", mistake)),
        wait=wait,
        sites=base.sites,
        policy=policy.load(files.folder / "policy.toml"),
        noise=partial(noise.noise_source, client=name, seed=seed if is_test else None),
        seed=seed,
        resolution=base.resolution,
        check_memory=partial(preflight.check_memory, base, store),
        variants=ALL_CAPTIONS._replace(
            flip=_flag(node_config, "flip"), dropout=float(node_config.get("caption-dropout", 0))
        ),
        previews=non_negative_int(node_config, "previews"),
        measured_cost=measured_cost,
        named_sites=named_sites(base.sites, attention=base.attention),
    )


def build_report(
    name: str,
    base: Base,
    stated: Mapping[str, Any],
    *,
    store: Store | None = None,
    read: Callable[[], Conditions] | None = None,
) -> DeviceReport:
    """Describe this machine: measured memory and cores, rates and watts, and the current sensor readings.

    Rates and watts are taken from the configuration, else from the result of `anther device benchmark`, else from a
    small board.

    Args:
        name: the device's name.
        base: the device's base.
        stated: the node's configuration.
        store: caches the predicted duration of a pass; None: no cache.
        read: reads the sensors; None: the current state is left out.
    """
    import psutil

    cores = psutil.cpu_count(logical=False) or 1
    measured = throughput.benchmarked(base, store)
    report = DeviceReport(
        device=name,
        base=base.hash,
        profile=f"{platform.machine().lower()}_{cores}_cores",
        memory_gib=float(round(psutil.virtual_memory().total / 2**30)),
        examples_per_second=_positive(
            stated,
            "examples-per-second",
            measured.examples_per_second if measured else EXAMPLES_PER_SECOND_PER_CORE * cores,
        ),
        watts=_positive(stated, "watts", measured.watts if measured else WATTS),
        uplink_mbps=_positive(stated, "uplink-mbps", UPLINK_MBPS),
        downlink_mbps=_positive(stated, "downlink-mbps", DOWNLINK_MBPS),
        metered=_flag(stated, "metered"),
        battery_wh=measured.battery_wh if measured else None,
        rank=non_negative_int(stated, "rank") or None,
        sites=_sites(stated, base),
    )
    return report if read is None else with_conditions(report, read())


def with_conditions(report: DeviceReport, now: Conditions) -> DeviceReport:
    """Add the current state to a report, as coarse as the server needs it: finer readings stay on the device."""
    return replace(
        report,
        battery=None if now.battery is None else math.floor(5 * now.battery + 1e-9) / 5,
        charging=bool(now.charging),
        busy=bool(now.owner_active),
        hot=bool(now.throttled) or (now.celsius or 0) > HOT or (now.battery_celsius or 0) > BATTERY_HOT,
        metered=report.metered or bool(now.metered),
    )


def _sites(stated: Mapping[str, Any], base: Base) -> tuple[str, ...] | None:
    """Return the layers that the device trains; None: any."""
    value = str(stated.get("sites") or "")
    return tuple(resolve_sites(base.sites, value, attention=base.attention, key="sites")) if value else None


def _folder(node_config: Mapping[str, Any]) -> Path:
    """Return the folder of the owner's pictures, or of one simulated owner's."""
    if "data" in node_config:
        return Path(str(node_config["data"])).expanduser()
    if "partition-id" not in node_config or "data-root" not in node_config:
        raise AntherError(f"the node's configuration names no pictures: set data to a folder with {METADATA}")
    root = Path(str(node_config["data-root"])).expanduser()
    owners = sorted(folder for folder in root.glob("*/") if not folder.name.startswith("."))
    index = non_negative_int(node_config, "partition-id")
    if index >= len(owners):
        raise AntherError(f"{root}: has {len(owners)} sub-folders, so there is none for partition {index}")
    return owners[index]


def _positive(values: Mapping[str, Any], key: str, default: float) -> float:
    """Parse a number over 0; Flower passes values as text or numbers, as the user wrote them."""
    try:
        number = float(values.get(key, default))
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise AntherError(f"{key}={values[key]}: must be a number over 0")
    return number


def non_negative_int(values: Mapping[str, Any], key: str) -> int:
    """Parse a whole number of 0 or more; 0 if the key is missing."""
    text = str(values.get(key, 0))
    if not text.isdecimal():
        raise AntherError(f"{key}={text}: must be a whole number of 0 or more")
    return int(text)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = str(values.get(key, False)).lower()
    if value not in ("true", "false"):
        raise AntherError(f"{key}={values[key]}: must be true or false")
    return value == "true"
