"""The typed schema of a server, `conf/serve.yaml`: a federation's own settings beside those of its runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from conf.schemas.checks import require
from conf.schemas.simulation import SimulationConfig


@dataclass
class LimitsConfig:
    """How much devices may ask of a server, and who hasn't shown yet that it is one."""

    requests_per_minute: int = 1200  # of one device; a device at work makes about 150
    concurrent: int = 8  # requests of one device at once, until their answers are read
    connections: int = 64  # of one address (of IPv6: one /64) on which no enrolled device has shown yet
    total_connections: int = 2048  # of all; at most three quarters of the files that the process may open
    header_seconds: float = 20.0  # for a TLS handshake and the head of a request
    idle_seconds: float = 60.0  # without a byte in the middle of a request or an answer
    slowest_kib: float = 4.0  # a second: a request that comes more slowly is cut off after a minute
    body_mib: int = 256  # of memory for all requests that are being read; a quarter at most for one device

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            require(value > 0, f"server.limits.{key}={value:g}: must be over 0")


@dataclass
class ServerConfig:
    """Where devices reach it, and who may come."""

    folder: str | None = None  # of its keys, register and state; null: ANTHER_HOME/server
    host: str = "0.0.0.0"  # address that it listens on
    port: int = 9443
    inner_port: int = 9444  # of Flower's SuperLink, on this machine only
    hosts: list[str] = field(default_factory=list)  # names and addresses under which devices reach it, for its
    # certificate; empty: this machine's
    unguarded: bool = False  # start also where the system can't tell which local user connects to inner_port: any of
    # them could then run code as this server. Linux can tell
    disk_gib: float = 20.0  # that messages may fill at most; then the SuperLink starts again without them, and the run
    # goes on after its last whole round
    insecure: bool = False  # no TLS and no keys: on loopback only, to try things
    devices: int = 100  # that take part at most: with privacy per device and fleet.rate, noise is reckoned with it
    per_holder: int = 5  # devices of one person at most
    again: bool = False  # begin another run of a configuration whose last one is over; else that is refused, since a
    # machine that starts again would ask every device for another run
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    min_devices: int = 2  # that a run waits for before it begins or goes on; 1 lets one device work alone
    patience: float = 48.0  # hours without a good reply in any round, after which the run stops, unfinished

    def __post_init__(self) -> None:
        for key in ("port", "inner_port"):
            require(0 < getattr(self, key) < 65536, f"server.{key}={getattr(self, key)}: must be 1 to 65535")
        require(self.port != self.inner_port, f"server.inner_port={self.inner_port}: must not be server.port")
        local = self.host in ("127.0.0.1", "::1", "localhost")
        alone = "with server.insecure=true only 127.0.0.1, ::1 or localhost"
        require(local or not self.insecure, f"server.host={self.host}: {alone}")
        require(self.disk_gib > 0, f"server.disk_gib={self.disk_gib:g}: must be over 0")
        for key in ("devices", "per_holder", "min_devices"):
            require(getattr(self, key) >= 1, f"server.{key}={getattr(self, key)}: must be 1 or more")
        few = f"server.min_devices={self.min_devices}: no more than server.devices={self.devices} take part"
        require(self.min_devices <= self.devices, few)
        require(self.patience > 0, f"server.patience={self.patience}: must be over 0")


@dataclass
class ServeConfig(SimulationConfig):
    """A server: all of a simulation's keys that concern rounds, and where it is."""

    server: ServerConfig = field(default_factory=ServerConfig)


ConfigStore.instance().store(name="serve_schema", node=ServeConfig)
