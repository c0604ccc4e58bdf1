"""Schema of a real device, `anther device run`. The owner sets every value, never a server.

`anther device enroll` writes its words to ANTHER_HOME/node.conf, one `key=value` per line; the command line overrides
them.
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
from conf.renames import NODE, present_words, refuse_renamed
from conf.schemas.checks import require, require_choice, require_color


@dataclass
class ConnectionConfig:
    """Connection to the federation's server."""

    address: str | None = None
    """Its host:port; null: not enrolled yet."""
    insecure: bool = False
    """No TLS and no keys: for a server on this machine only."""
    poll_seconds: float = 0.5
    """Seconds between polls for a message during a run; they grow up to max_poll_seconds while none arrives."""
    max_poll_seconds: float = 5.0
    """Longest interval between polls in seconds."""

    def __post_init__(self) -> None:
        require(self.poll_seconds >= 0.05, f"connection.poll_seconds={self.poll_seconds}: must be 0.05 or more")
        low = f"connection.max_poll_seconds={self.max_poll_seconds}: must not be under connection.poll_seconds"
        require(self.poll_seconds <= self.max_poll_seconds, low)


@dataclass
class ThrottleConfig:
    """Conditions under which training pauses, checked before every step."""

    require_charging: bool = True
    """A device with a battery trains only while charging."""
    min_battery: float = 0.4
    """Minimum charge for training, as a fraction of a full battery."""
    max_celsius: float | None = 80.0
    """Highest temperature of the device in °C, and no thermal throttling; null: any."""
    max_battery_celsius: float | None = 40.0
    """Highest temperature of the battery in °C, because heat ages it; null: any."""
    require_idle: bool = False
    """Pause while the owner uses the device."""
    require_unmetered: bool = False
    """Pause while the network is paid by volume."""
    min_free_mib: float = 150.0
    """Minimum free memory in MiB for other processes; below it, training frees its memory."""
    max_wait_seconds: float = 900.0
    """Seconds of a pause with the base in memory; afterwards it is freed, and the round restarts when allowed."""
    poll_seconds: float = 1.0
    """Seconds between checks during a pause."""

    def __post_init__(self) -> None:
        require(0 <= self.min_battery <= 1, f"throttle.min_battery={self.min_battery}: must be 0 to 1")
        for key in ("max_celsius", "max_battery_celsius"):
            value = getattr(self, key)
            require(value is None or value > 0, f"throttle.{key}={value}: must be over 0, or null")
        for key in ("min_free_mib", "max_wait_seconds"):
            require(getattr(self, key) >= 0, f"throttle.{key}={getattr(self, key)}: must be 0 or more")
        require(self.poll_seconds > 0, f"throttle.poll_seconds={self.poll_seconds}: must be over 0")


@dataclass
class PowerConfig:
    """Source of readings of power, battery, temperature and use."""

    meter: str = "auto"
    """auto (the first that this device has), none (estimates from watts), pi5, battery, rapl, nvml, termux or file."""
    file: str | None = None
    """With meter=file: JSON file of a device's sensor readings, for tests and gateways."""
    watts: float | None = None
    """Power while training in watts, if nothing measures it; null: the device profile's, or a small board's."""

    def __post_init__(self) -> None:
        require((self.meter == "file") == (self.file is not None), "power.file: requires power.meter=file")
        require(self.watts is None or self.watts > 0, f"power.watts={self.watts}: must be over 0, or null")


@dataclass
class WorkerConfig:
    """The process that holds the base."""

    memory_gib: float | None = None
    """Memory for training in GiB; null: a quarter of the machine's."""
    threads: int | None = None
    """CPU threads; null: all cores."""
    nice: int = 10
    """Scheduling priority, 0 to 19: a higher number yields to other processes."""
    idle_seconds: float = 300.0
    """Seconds without work after which it frees its memory."""

    def __post_init__(self) -> None:
        for key in ("memory_gib", "threads"):
            value = getattr(self, key)
            require(value is None or value > 0, f"worker.{key}={value}: must be over 0, or null")
        require(0 <= self.nice <= 19, f"worker.nice={self.nice}: must be 0 to 19")
        require(self.idle_seconds >= 0, f"worker.idle_seconds={self.idle_seconds}: must be 0 or more")


@dataclass
class FetchConfig:
    """Source of a base that the device lacks."""

    source: str = "auto"
    """folder, hub or server; auto: the first of them that has it."""
    folder: str | None = None
    """Folder of a base on this device or a USB stick; identified by content, not by name."""
    hub: str | None = None
    """Repository on the Hugging Face Hub, 'owner/name'."""
    allow_metered: bool = False
    """Download also while the network is paid by volume."""
    min_free_gib: float = 1.0
    """Disk space in GiB that stays free."""

    def __post_init__(self) -> None:
        require_choice("fetch.source", self.source, ("auto", "folder", "hub", "server"))
        require(self.min_free_gib >= 0, f"fetch.min_free_gib={self.min_free_gib}: must be 0 or more")


@dataclass
class StorageConfig:
    """Encryption of the device's store."""

    encrypt: str = "auto"
    """auto: encrypt if the platform has a key store; always: refuse to store anything without one; never."""

    def __post_init__(self) -> None:
        require_choice("storage.encrypt", self.encrypt, ("auto", "always", "never"))


@dataclass
class NodeConfig:
    """One device of a real federation."""

    data: str | None = None
    """Folder with the owner's pictures and metadata.jsonl; null: not set yet."""
    caption: str | None = None
    """One caption for all pictures, or with {text} a text around each picture's own; null: their own."""
    background: str = "white"
    """Color behind transparent pictures: white, black, gray or '#rrggbb'."""
    flip: bool = False
    """Train on mirror images too; not for faces or text. Only without example-level privacy."""
    caption_dropout: float = 0.0
    """Probability of training a picture without its caption. Only without example-level privacy."""
    name: str | None = None
    """Name of the device at the server; null: the machine's."""
    federation: str | None = None
    """Federation that it is enrolled in; states of different federations are kept apart."""
    base: str | None = None
    """Name, folder or content hash of the base; null: the federation's."""
    store: str | None = None
    """Folder of the device's store; null: ANTHER_HOME/devices/<name>."""
    weights: str = "fp32"
    """Format of the frozen base: fp32, or int8, mixed or nf4 for less memory."""
    device: str = "auto"
    """Torch device; auto: cuda if available."""
    resolution: int | None = None
    """Side of the pictures in pixels; null: the base's own."""
    gradient_checkpointing: str = "none"
    """none, or block: half the memory of a step, a fifth more time."""
    max_rank: int | None = None
    """Highest rank that it trains; null: any."""
    sites: str | None = None
    """Layers that it trains, of those that have adapters: attention, linear, all, or a regular expression on their
    names; null: all."""
    previews: int = 0
    """Pictures drawn into the store after each personalization."""
    uplink_mbps: float | None = None
    """Uplink in Mbit/s; null: that of mobile data."""
    downlink_mbps: float | None = None
    """Downlink in Mbit/s; null: that of mobile data."""
    examples_per_second: float | None = None
    """Training speed; null: as measured by `anther device benchmark`, or a small board's."""
    test: bool = False
    """Reproducible noise for tests: no update counts as a release, and only a test server accepts it."""
    seed: int = 0
    """Seed of a test."""
    plugins: str | None = None
    """Names of installed plug-ins that the device may load, separated by commas; null: none."""
    connection: ConnectionConfig = field(default_factory=ConnectionConfig)
    throttle: ThrottleConfig = field(default_factory=ThrottleConfig)
    power: PowerConfig = field(default_factory=PowerConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    @property
    def allowed_plugins(self) -> list[str]:
        """Names of `plugins`."""
        return [name.strip() for name in (self.plugins or "").split(",") if name.strip()]

    def __post_init__(self) -> None:
        require_color("background", self.background)
        own = self.name is None or (Path(self.name).name == self.name and self.name not in ("", ".."))
        require(own, f"name={self.name}: must not be a path, nor empty")
        require(self.caption is None or self.caption.strip() != "", "caption: must not be empty; write one, or null")
        require(
            0 <= self.caption_dropout < 1, f"caption_dropout={self.caption_dropout}: must be 0 or more, and under 1"
        )
        for key in ("data", "store", "base"):  # an empty path is the current folder
            require(getattr(self, key) != "", f"{key}: must not be empty; name a folder, or null")
        require_choice("weights", self.weights, ("fp32", "int8", "mixed", "nf4"))
        require_choice("gradient_checkpointing", self.gradient_checkpointing, ("none", "block"))
        for key in ("resolution", "max_rank", "uplink_mbps", "downlink_mbps", "examples_per_second"):
            value = getattr(self, key)
            require(value is None or value > 0, f"{key}={value}: must be over 0, or null")
        require(self.previews >= 0, f"previews={self.previews}: must be 0 or more")
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")


def read_enrollment(file: Path) -> list[str]:
    """Return the `key=value` words of the enrollment's file, in order, under the keys' present names.

    Returns:
        An empty list if the device is not enrolled.

    Raises:
        AntherError: the file can't be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise AntherError(f"{file}: can't be read ({error}); run anther device enroll again") from error
    try:
        words = [word for line in lines if line.strip() and not line.startswith("#") for word in shlex.split(line)]
    except ValueError as error:
        raise AntherError(f"{file}: {error}; it holds one key=value per line") from error
    return present_words(words, NODE)


def compose(words: Sequence[str], file: Path) -> NodeConfig:
    """Compose a device's configuration: the schema's defaults, then the enrollment's file, then `words`.

    Composed by OmegaConf without Hydra, as in `conf.schemas.planning`: there are no groups, and paths need no quotes.

    Raises:
        AntherError: a key or a value is refused, in one line.
    """
    refuse_renamed(words, NODE)
    overrides = [parse_override(word, NodeConfig) for word in (*read_enrollment(file), *words)]
    try:
        config = OmegaConf.merge(OmegaConf.structured(NodeConfig), *overrides)
    except OmegaConfBaseException as error:
        raise AntherError(explain(error, known_keys(NodeConfig), NODE)) from error
    node: NodeConfig = to_object(config, NodeConfig, NODE)  # type: ignore[arg-type]
    return node
