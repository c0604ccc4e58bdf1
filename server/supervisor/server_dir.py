"""Folder of a federation on its server: certificates, keys, and the address for devices.

authority.crt, .key     of the federation: devices identify it by its fingerprint. Keep a copy of the key elsewhere
server.crt, .key        of the port; replaced before they expire, and by `anther keys rotate`
federation.json         name, address, and maximum number of devices per holder
register.json           enrolled devices and tickets
superlink.db, flower/   Flower's own
spool/                  incomplete replies of devices
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from common import strict_json
from common.atomic_files import make_folder, write
from common.errors import AntherError
from conf.schemas.server import ServerConfig
from models.files import assets
from server.gateway import pki
from server.gateway.pki import Certificates
from server.supervisor.superlink import LOOPBACK

_RENEWED = 30.0  # days before its expiry when a server certificate is replaced


@dataclass(frozen=True, kw_only=True)
class ServerAddress:
    """Name of a federation, and its address for devices; field names are the stored format."""

    federation: str
    host: str
    port: int
    per_holder: int = ServerConfig.max_devices_per_holder


@dataclass(frozen=True)
class ServerDir:
    """The folder of one federation."""

    folder: Path

    @property
    def certificates(self) -> Certificates:
        return Certificates(*(self.folder / name for name in ("authority.crt", "server.crt", "server.key")))

    def spool(self) -> Path:
        """Return an empty folder for incoming replies."""
        folder = self.folder / "spool"
        make_folder(folder)
        for file in folder.iterdir():
            file.unlink()
        return folder

    def address(self) -> ServerAddress:
        """Return the address of the federation.

        Raises:
            AntherError: the server has never been started, or the file is damaged.
        """
        try:
            return strict_json.from_plain(
                ServerAddress, strict_json.loads((self.folder / "federation.json").read_bytes())
            )
        except FileNotFoundError:
            raise AntherError(
                f"{self.folder}: no federation yet: run anther keys init, or start anther serve"
            ) from None
        except ValueError as error:
            raise AntherError(
                f"{self.folder / 'federation.json'} is damaged ({error}): run anther keys init"
            ) from error

    def prepare(self, hosts: Sequence[str], port: int, per_holder: int = ServerConfig.max_devices_per_holder) -> None:
        """Create missing files; replace the server's certificate if it expires soon or is for other hosts.

        Args:
            hosts: names and addresses at which devices reach the server; empty: those of this machine.
            port: port for devices.
            per_holder: maximum number of devices per holder.

        Raises:
            AntherError: a new certificate is needed, and the authority's key is missing.
        """
        make_folder(self.folder)
        if not (self.folder / "authority.crt").exists():
            authority = pki.create_authority(f"Anther federation on {socket.gethostname()}")
            write(self.folder / "authority.key", authority.key)
            write(self.folder / "authority.crt", authority.certificate)
        certificate = self.certificates.certificate
        if not certificate.exists():
            self.rotate(hosts or local_hosts())
        elif hosts and not set(hosts) <= set(pki.hosts_of(certificate.read_bytes())):
            self.rotate(hosts)
        else:
            self.renew()
        host = (list(hosts) or pki.hosts_of(certificate.read_bytes()))[0]
        self._write_address(
            ServerAddress(federation=self.fingerprint()[:16], host=host, port=port, per_holder=per_holder)
        )

    def renew(self) -> None:
        """Replace the server's certificate if it expires soon.

        Raises:
            AntherError: the authority's key is missing.
        """
        if pki.days_left(self.certificates.certificate.read_bytes(), datetime.now(UTC)) < _RENEWED:
            self.rotate()

    def rotate(self, hosts: Sequence[str] = ()) -> None:
        """Create a new key and certificate for the server, signed by the same authority: devices need no change.

        Raises:
            AntherError: the authority's key is missing.
        """
        key = self.folder / "authority.key"
        if not key.exists():
            raise AntherError(f"{key} is missing: restore the authority's key to sign a new certificate")
        names = [*(hosts or pki.hosts_of(self.certificates.certificate.read_bytes()))]
        names += [name for name in (LOOPBACK, "localhost") if name not in names]
        pair = pki.issue(pki.KeyPair(self.certificates.authority.read_bytes(), key.read_bytes()), names)
        write(self.certificates.key, pair.key)
        write(self.certificates.certificate, pair.certificate)

    def fingerprint(self) -> str:
        """Return the fingerprint of the federation's authority."""
        return pki.fingerprint(self.certificates.authority.read_bytes())

    def _write_address(self, address: ServerAddress) -> None:
        write(self.folder / "federation.json", strict_json.dumps(address).encode())


def of(folder: str | None) -> ServerDir:
    """Return the server's folder at this path; None: the one in ANTHER_HOME."""
    return ServerDir(Path(folder).expanduser().absolute() if folder else assets.home() / "server")


def local_hosts() -> list[str]:
    """List addresses and names of this machine, first those that others can reach."""
    outside = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    return [*dict.fromkeys([*outside, socket.gethostname(), LOOPBACK, "localhost"])]
