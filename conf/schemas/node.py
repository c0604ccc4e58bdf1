"""The schema of a real device, `anther device run`: what its owner decides, and no server.

`anther device enroll` writes what was said at enrolment to ANTHER_HOME/node.conf, a `key=value` a line; what the
command line says goes over that.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import AntherError
from conf.cli import to_object
from conf.explain import explain, known_keys
from conf.key_value import parse_override
from conf.schemas.checks import require, require_choice, require_color

METERS = ("auto", "none", "pi5", "battery", "rapl", "nvml", "termux", "file")


@dataclass
class ConnectionConfig:
    """The federation that a device belongs to."""

    address: str | None = None  # host:port of its server; null: not enrolled yet
    insecure: bool = False  # no TLS and no keys: for a server on this machine only
    poll_seconds: float = 0.5  # between two looks for a message while a run is at work; the longer nothing comes the
    # longer, up to slow_poll_seconds
    slow_poll_seconds: float = 5.0

    def __post_init__(self) -> None:
        require(self.poll_seconds >= 0.05, f"link.poll_seconds={self.poll_seconds}: must be 0.05 or more")
        least = f"link.slow_poll_seconds={self.slow_poll_seconds}: must not be under link.poll_seconds"
        require(self.poll_seconds <= self.slow_poll_seconds, least)


@dataclass
class ThrottleConfig:
    """When training stands back: looked at before every step."""

    charging: bool = True  # a device with a battery trains on its charger only
    battery: float = 0.4  # and not with less than this share of a full one
    celsius: float | None = 80.0  # not while it is hotter, nor throttled; null: however hot
    battery_celsius: float | None = 40.0  # not while its battery is hotter, since that ages it; null: however hot
    idle: bool = False  # not while its owner uses it
    unmetered: bool = False  # not while its network is paid by volume
    free_mib: float = 150.0  # not with less memory left for all that else runs: what training holds is given back
    patience: float = 900.0  # seconds that it waits with what it has in memory; then it lets go, and starts the round
    # again when it may
    poll_seconds: float = 1.0  # between two looks while it waits

    def __post_init__(self) -> None:
        require(0 <= self.battery <= 1, f"guard.battery={self.battery}: must be 0 to 1")
        for key in ("celsius", "battery_celsius"):
            value = getattr(self, key)
            require(value is None or value > 0, f"guard.{key}={value}: must be over 0, or null")
        for key in ("free_mib", "patience"):
            require(getattr(self, key) >= 0, f"guard.{key}={getattr(self, key)}: must be 0 or more")
        require(self.poll_seconds > 0, f"guard.poll_seconds={self.poll_seconds}: must be over 0")


@dataclass
class PowerConfig:
    """Where readings of power, battery, heat and use come from."""

    meter: str = "auto"  # the first that this device has; none: estimates from watts alone
    file: str | None = None  # with meter=file: JSON that says what a device's sensors would, for tests and gateways
    watts: float | None = None  # while training, where nothing measures it; null: its profile's, or a small board's

    def __post_init__(self) -> None:
        require_choice("power.meter", self.meter, METERS)
        require((self.meter == "file") == (self.file is not None), "power.file: goes with power.meter=file")
        require(self.watts is None or self.watts > 0, f"power.watts={self.watts}: must be over 0, or null")


@dataclass
class WorkerConfig:
    """The process that holds the base."""

    memory_gib: float | None = None  # that training may take; null: a quarter of the machine's
    threads: int | None = None  # cores that it uses; null: all
    nice: int = 10  # of the scheduler: whoever else runs goes first
    idle_seconds: float = 300.0  # without work, after which it gives its memory back

    def __post_init__(self) -> None:
        for key in ("memory_gib", "threads"):
            value = getattr(self, key)
            require(value is None or value > 0, f"worker.{key}={value}: must be over 0, or null")
        require(0 <= self.nice <= 19, f"worker.nice={self.nice}: must be 0 to 19")
        require(self.idle_seconds >= 0, f"worker.idle_seconds={self.idle_seconds}: must be 0 or more")


@dataclass
class FetchConfig:
    """How a device that lacks the base gets it."""

    source: str = "auto"  # folder, hub or server; auto: the first of these that has it
    folder: str | None = None  # of a base on this device or a stick; content is what counts, not its name
    hub: str | None = None  # 'owner/name'
    metered: bool = False  # also while the network is paid by volume
    free_gib: float = 1.0  # of the disk, that stay free

    def __post_init__(self) -> None:
        require_choice("fetch.source", self.source, ("auto", "folder", "hub", "server"))
        require(self.free_gib >= 0, f"fetch.free_gib={self.free_gib}: must be 0 or more")


@dataclass
class StorageConfig:
    """How what a device keeps lies on its disk."""

    encrypt: str = "auto"  # auto: where the platform keeps a key for us; always: or nothing is kept; never

    def __post_init__(self) -> None:
        require_choice("storage.encrypt", self.encrypt, ("auto", "always", "never"))


@dataclass
class NodeConfig:
    """One device of a real federation."""

    data: str | None = None  # the folder with its owner's pictures and metadata.jsonl; null: not said yet
    background: str = "white"  # what shows through where a picture is transparent: white, black, gray or '#rrggbb'
    name: str | None = None  # that the server knows it by; null: the machine's
    federation: str | None = None  # that it was enrolled with: what it keeps of one is not mixed with another's
    base: str | None = None  # name, folder or content hash; null: the federation's
    store: str | None = None  # folder of what it keeps; null: ANTHER_HOME/devices/<name>
    weights: str = "fp32"  # how the frozen base is held: int8, mixed or nf4 for less memory
    device: str = "auto"  # torch device; auto: cuda if there is one
    resolution: int | None = None  # side of pictures in pixels; null: what the base was made for
    checkpointing: str = "none"  # block: half the memory of a step, for a fifth more time
    rank: int | None = None  # the highest that it trains; null: any
    sites: str | None = None  # regular expression on the names of the only layers that it trains; null: any
    previews: int = 0  # pictures drawn into the store whenever something was learnt
    uplink_mbps: float | None = None  # null: mobile data's
    downlink_mbps: float | None = None
    examples_per_second: float | None = None  # trained; null: as `anther device benchmark` found, or a small board's
    test: bool = False  # noise reproducible by seed: nothing is a release, and no server but a test's takes it
    seed: int = 0  # of a test
    link: ConnectionConfig = field(default_factory=ConnectionConfig)
    guard: ThrottleConfig = field(default_factory=ThrottleConfig)
    power: PowerConfig = field(default_factory=PowerConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        require_color("background", self.background)
        own = self.name is None or (Path(self.name).name == self.name and self.name not in ("", ".."))
        require(own, f"name={self.name}: must not be a path, nor empty")
        require_choice("weights", self.weights, ("fp32", "int8", "mixed", "nf4"))
        require_choice("checkpointing", self.checkpointing, ("none", "block"))
        for key in ("resolution", "rank", "uplink_mbps", "downlink_mbps", "examples_per_second"):
            value = getattr(self, key)
            require(value is None or value > 0, f"{key}={value}: must be over 0, or null")
        require(self.previews >= 0, f"previews={self.previews}: must be 0 or more")
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")


def read_enrollment(file: Path) -> list[str]:
    """The words that an enrolment has left, in order; none before it.

    Raises:
        AntherError: the file can't be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise AntherError(f"{file}: can't be read ({error}); enrol again with anther device enroll") from error
    try:
        return [word for line in lines if line.strip() and not line.startswith("#") for word in shlex.split(line)]
    except ValueError as error:
        raise AntherError(f"{file}: {error}; it holds a key=value a line") from error


def compose(words: Sequence[str], file: Path) -> NodeConfig:
    """A device's configuration: of this schema, over it the file of its enrolment, over it these words.

    Composed by OmegaConf alone, as `conf.schemas.planning`: there are no groups, and paths may be written as people do.

    Raises:
        AntherError: a key or a value is refused, in one line.
    """
    asked = [parse_override(word, NodeConfig) for word in (*read_enrollment(file), *words)]
    try:
        config = OmegaConf.merge(OmegaConf.structured(NodeConfig), *asked)
    except OmegaConfBaseException as error:
        raise AntherError(explain(error, known_keys(NodeConfig))) from error
    node: NodeConfig = to_object(config, NodeConfig)  # type: ignore[arg-type]
    return node
