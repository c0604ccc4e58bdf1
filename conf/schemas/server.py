"""Schema of a server, `conf/serve.yaml`: the settings of the federation, besides those of its runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from conf.schemas.checks import require
from conf.schemas.federation import FederationConfig


@dataclass
class LimitsConfig:
    """Limits on the requests of enrolled devices and of unauthenticated clients."""

    requests_per_minute: int = 1200
    """Requests of one device per minute; a training device makes about 150."""
    concurrent_requests: int = 8
    """Requests of one device at the same time, until their responses are read."""
    connections_per_address: int = 64
    """Connections of one address (of IPv6: one /64) that no enrolled device has authenticated yet."""
    total_connections: int = 2048
    """All connections; at most three quarters of the process's open files."""
    header_seconds: float = 20.0
    """Seconds for a TLS handshake and a request's header."""
    idle_seconds: float = 60.0
    """Seconds without a byte in the middle of a request or a response."""
    min_kib_per_second: float = 4.0
    """Slowest request in KiB/s; a slower one is cut off after a minute."""
    request_memory_mib: int = 256
    """Memory for all requests that are being read, in MiB; a quarter at most for one device."""

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            require(value > 0, f"server.limits.{key}={value:g}: must be over 0")


@dataclass
class ServerConfig:
    """Address of the federation, and its limits on devices."""

    folder: str | None = None
    """Folder of its keys, device registry and state; null: ANTHER_HOME/server."""
    host: str = "0.0.0.0"
    """Address that it listens on."""
    port: int = 9443
    """Port for devices."""
    superlink_port: int = 9444
    """Port of Flower's SuperLink, on this machine only."""
    hostnames: list[str] = field(default_factory=list)
    """Names and addresses under which devices reach it, for its certificate; empty: those of this machine."""
    trust_local_users: bool = False
    """Start also where the system can't tell which local user connects to superlink_port: any of them could then run
    code as this server. Linux can tell."""
    max_disk_gib: float = 20.0
    """Disk space for messages in GiB. Beyond it the SuperLink restarts without them, and the run continues after its
    last complete round."""
    insecure: bool = False
    """No TLS and no keys: on loopback only, for tests."""
    max_devices: int = 100
    """Maximum number of devices; with privacy per device and cohort.sampling_rate, the noise is computed for it."""
    max_devices_per_holder: int = 5
    """Maximum number of devices per person."""
    allow_rerun: bool = False
    """Start another run of a configuration whose last run is finished. Refused by default, because a machine that
    restarts would otherwise ask every device for another run."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    min_devices: int = 2
    """Devices that a run waits for before it starts or continues; 1 lets one device train without others."""
    max_idle_hours: float = 48.0
    """Hours without an accepted reply after which the run stops, unfinished."""

    def __post_init__(self) -> None:
        for key in ("port", "superlink_port"):
            require(0 < getattr(self, key) < 65536, f"server.{key}={getattr(self, key)}: must be 1 to 65535")
        superlink = f"server.superlink_port={self.superlink_port}"
        require(self.port != self.superlink_port, f"{superlink}: must not be server.port")
        local = self.host in ("127.0.0.1", "::1", "localhost")
        loopback = "with server.insecure=true only 127.0.0.1, ::1 or localhost"
        require(local or not self.insecure, f"server.host={self.host}: {loopback}")
        require(self.max_disk_gib > 0, f"server.max_disk_gib={self.max_disk_gib:g}: must be over 0")
        for key in ("max_devices", "max_devices_per_holder", "min_devices"):
            require(getattr(self, key) >= 1, f"server.{key}={getattr(self, key)}: must be 1 or more")
        few = f"server.min_devices={self.min_devices}: must not be over server.max_devices={self.max_devices}"
        require(self.min_devices <= self.max_devices, few)
        require(self.max_idle_hours > 0, f"server.max_idle_hours={self.max_idle_hours}: must be over 0")


@dataclass
class ServeConfig(FederationConfig):
    """A server: the keys of its federation, and its own."""

    server: ServerConfig = field(default_factory=ServerConfig)


ConfigStore.instance().store(name="serve_schema", node=ServeConfig)
