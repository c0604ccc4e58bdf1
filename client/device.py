"""One device: what it tells of itself, what it keeps, what it allows, and where its randomness comes from."""

from __future__ import annotations

import logging
import math
import platform
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from client.cli.paths import device_files
from client.data import METADATA, WHITE, Pictures, load_folder
from client.planning import preflight, throughput
from client.power.conditions import Conditions
from client.power.meter import TrainingCost
from client.store.store import Store
from common.errors import AntherError
from models.base.base import Base
from models.lora.adapter import Sites
from privacy import noise, policy
from privacy.noise import NoiseSource
from protocol.messages import DeviceReport

log = logging.getLogger(__name__)

# What a device is taken for that doesn't say: the slowest of conf/fleet, so that nothing is promised too soon.
EXAMPLES_PER_SECOND_PER_CORE = 6.0  # Raspberry Pi 4, glyph base: estimate, see conf/fleet/mixed.yaml
WATTS = 6.4  # Raspberry Pi 4, whole board
UPLINK_MBPS, DOWNLINK_MBPS = 8.0, 40.0  # mobile data
HOT, BATTERY_HOT = (
    80.0,
    40.0,
)  # °C, as `throttle.max_celsius` and `throttle.max_battery_celsius`: from here on training waits


def _at_once(_: float) -> None:
    pass


def _no_limit(_: int, __: Collection[str]) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Device:
    """All that `client.rounds.handler` needs to answer for one device."""

    name: str
    report: DeviceReport
    store: Store
    pictures: Callable[[], Pictures]
    """Reads the owner's pictures when they are needed, and raises AntherError if they can't be used."""
    sites: Sites
    """Where the base that it holds can be adapted."""
    policy: policy.Policy
    noise: Callable[[int, str], NoiseSource]
    """The source for one round and purpose; the server has no say in it."""
    seed: int
    """Of the ordinary streams: batches without privacy, timesteps, diffusion noise."""
    resolution: int
    """Side in pixels of pictures as the base sees them."""
    listed: Callable[[], Pictures] | None = None
    """The same for private jobs, with an Absent where a picture can't be used, as its owner's log says. None: as
    `pictures` has them."""
    wait: Callable[[float], None] = _at_once
    """Lets so many seconds pass before a private reply, so that it comes at a public time; Cancelled if the device is
    to stop meanwhile. In a simulation time is counted."""
    check_memory: Callable[[int, Collection[str]], None] = _no_limit
    """Raises Refusal if training an adapter of this rank at these sites wouldn't fit; a simulation's memory is the
    cohort's affair."""
    previews: int = 0
    """How many pictures its owner is shown of what was learnt, each time that something was."""
    spent: Callable[[], TrainingCost | None] | None = None
    """What the training that was done last took, as a meter found; None: it has none, and estimates."""


def from_config(
    node_config: Mapping[str, Any],
    base: Base,
    *,
    store: Store | None = None,
    read: Callable[[], Conditions] | None = None,
    spent: Callable[[], TrainingCost | None] | None = None,
    wait: Callable[[float], None] = _at_once,
) -> Device:
    """The device that a SuperNode's own configuration describes.

    Args:
        node_config: `data`, the folder of pictures, or else `data-root` and `partition-id`, which pick its k-th
            sub-folder in a simulation. Optional: `background`, which transparent pictures are put on; `name`; `store`,
            a folder; `previews`, how many pictures are drawn into it whenever something was learnt; `test=true`, which
            makes noise reproducible by `seed` and nothing a release; and what the report says: `examples-per-second`,
            `watts`, `uplink-mbps`, `downlink-mbps`, `metered`; and `rank` and `sites`, the highest rank and, as a
            regular expression, the only layers that it is to train.
        base: what the device holds.
        store: that is open already; None: it is opened here, in the clear.
        read: its sensors, for what the report says of now; None: nothing is said of it.
        spent, wait: as of the Device.

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
    seed = whole(node_config, "seed") if is_test else store.seed()
    read_pictures = partial(load_folder, pictures, background=str(node_config.get("background", WHITE)))
    return Device(
        name=name,
        report=build_report(name, base, node_config, store=store, read=read),
        store=store,
        pictures=read_pictures,
        listed=partial(read_pictures, on_error=lambda mistake: log.error("%s", mistake)),
        wait=wait,
        sites=base.sites,
        policy=policy.load(files.folder / "policy.toml"),
        noise=partial(noise.noise_source, client=name, seed=seed if is_test else None),
        seed=seed,
        resolution=base.resolution,
        check_memory=partial(preflight.check_memory, base, store),
        previews=whole(node_config, "previews"),
        spent=spent,
    )


def build_report(
    name: str,
    base: Base,
    stated: Mapping[str, Any],
    *,
    store: Store | None = None,
    read: Callable[[], Conditions] | None = None,
) -> DeviceReport:
    """The report of this machine: memory and cores as found, speed and watts as stated, as `anther device benchmark`
    has measured, or else a small board's; and what sensors say of now."""
    import psutil

    cores = psutil.cpu_count(logical=False) or 1
    known = throughput.benchmarked(base, store)
    report = DeviceReport(
        device=name,
        base=base.hash,
        profile=f"{platform.machine().lower()}_{cores}_cores",
        memory_gib=float(round(psutil.virtual_memory().total / 2**30)),
        examples_per_second=_positive(
            stated, "examples-per-second", known.examples_per_second if known else EXAMPLES_PER_SECOND_PER_CORE * cores
        ),
        watts=_positive(stated, "watts", known.watts if known else WATTS),
        uplink_mbps=_positive(stated, "uplink-mbps", UPLINK_MBPS),
        downlink_mbps=_positive(stated, "downlink-mbps", DOWNLINK_MBPS),
        metered=_flag(stated, "metered"),
        battery_wh=known.battery_wh if known else None,
        rank=whole(stated, "rank") or None,
        sites=_sites(stated, base.sites),
    )
    return report if read is None else with_conditions(report, read())


def with_conditions(report: DeviceReport, now: Conditions) -> DeviceReport:
    """The report with what holds now, as coarsely as it is told: the rest of what sensors say is nobody's business."""
    return replace(
        report,
        battery=None if now.battery is None else math.floor(5 * now.battery + 1e-9) / 5,
        charging=bool(now.charging),
        busy=bool(now.owner_active),
        hot=bool(now.throttled) or (now.celsius or 0) > HOT or (now.battery_celsius or 0) > BATTERY_HOT,
        metered=report.metered or bool(now.metered),
    )


def _sites(stated: Mapping[str, Any], sites: Sites) -> tuple[str, ...] | None:
    """The layers that a device is to train; None: any."""
    pattern = str(stated.get("sites") or "")
    try:
        found = tuple(name for name in sites if re.fullmatch(pattern or ".*", name))
    except re.error as error:
        raise AntherError(f"sites={pattern}: not a regular expression ({error})") from None
    if not found:
        raise AntherError(f"sites={pattern}: the base has none such; one that it has is {next(iter(sites))}")
    return found if pattern else None


def _folder(node_config: Mapping[str, Any]) -> Path:
    """The owner's pictures, or those of one simulated owner."""
    if "data" in node_config:
        return Path(str(node_config["data"])).expanduser()
    if "partition-id" not in node_config or "data-root" not in node_config:
        raise AntherError(f"the node's configuration names no pictures: set data to a folder with {METADATA}")
    root = Path(str(node_config["data-root"])).expanduser()
    owners = sorted(folder for folder in root.glob("*/") if not folder.name.startswith("."))
    chosen = whole(node_config, "partition-id")
    if chosen >= len(owners):
        raise AntherError(f"{root}: has {len(owners)} sub-folders, so there is none for partition {chosen}")
    return owners[chosen]


def _positive(values: Mapping[str, Any], key: str, default: float) -> float:
    """A number over 0; Flower passes what a person wrote."""
    try:
        number = float(values.get(key, default))
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise AntherError(f"{key}={values[key]}: must be a number over 0")
    return number


def whole(values: Mapping[str, Any], key: str) -> int:
    """A whole number of 0 or more; 0 if it isn't stated."""
    text = str(values.get(key, 0))
    if not text.isdecimal():
        raise AntherError(f"{key}={text}: must be a whole number of 0 or more")
    return int(text)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = str(values.get(key, False)).lower()
    if value not in ("true", "false"):
        raise AntherError(f"{key}={values[key]}: must be true or false")
    return value == "true"
