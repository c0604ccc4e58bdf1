"""A federation's place on its server's disk: certificates, keys, and where devices reach it.

authority.crt, .key     of the federation: devices know it by its fingerprint. Keep a copy of the key elsewhere
server.crt, .key        what the port shows; made anew before it ends, and by `anther keys rotate`
federation.json         its name and address, and how many devices each holder may have
register.json           who may take part
superlink.db, flower/   Flower's own
spool/                  replies of devices that aren't whole yet
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
from models.base import assets
from server.gateway import pki
from server.supervisor.superlink import LOOPBACK, Certificates

_RENEWED = 30.0  # days before its end a server's certificate is made anew


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where devices reach a federation, and what it is called."""

    federation: str
    host: str
    port: int
    per_holder: int = ServerConfig.per_holder


@dataclass(frozen=True)
class ServerDir:
    """One federation's folder."""

    folder: Path

    @property
    def certificates(self) -> Certificates:
        return Certificates(*(self.folder / name for name in ("authority.crt", "server.crt", "server.key")))

    def spool(self) -> Path:
        """Folder for replies that are coming in; empty."""
        folder = self.folder / "spool"
        make_folder(folder)
        for left in folder.iterdir():
            left.unlink()
        return folder

    def address(self) -> Address:
        """AntherError before the first start."""
        try:
            return strict_json.from_plain(Address, strict_json.loads((self.folder / "federation.json").read_bytes()))
        except FileNotFoundError:
            raise AntherError(f"{self.folder}: no federation yet: anther keys init, or start anther serve") from None
        except ValueError as error:
            raise AntherError(f"{self.folder / 'federation.json'} is damaged ({error}): init again") from error

    def prepare(self, hosts: Sequence[str], port: int, per_holder: int = ServerConfig.per_holder) -> None:
        """Make what is missing, and the server's certificate anew if it ends soon or is for other hosts."""
        make_folder(self.folder)
        if not (self.folder / "authority.crt").exists():
            made = pki.authority(f"Anther federation on {socket.gethostname()}")
            write(self.folder / "authority.key", made.key)
            write(self.folder / "authority.crt", made.certificate)
        known = self.certificates.certificate
        if not known.exists():
            self.rotate(hosts or found_hosts())
        elif hosts and not set(hosts) <= set(pki.hosts_of(known.read_bytes())):
            self.rotate(hosts)
        else:
            self.renew()
        host = (list(hosts) or pki.hosts_of(known.read_bytes()))[0]
        self._tell(Address(federation=self.fingerprint()[:16], host=host, port=port, per_holder=per_holder))

    def renew(self) -> None:
        """Make the server's certificate anew if it ends soon; AntherError as for `rotate`."""
        if pki.days_left(self.certificates.certificate.read_bytes(), datetime.now(UTC)) < _RENEWED:
            self.rotate()

    def rotate(self, hosts: Sequence[str] = ()) -> None:
        """A new key and certificate for the server, by the same authority: devices notice nothing.

        Raises:
            AntherError: the authority's key is not here.
        """
        key = self.folder / "authority.key"
        if not key.exists():
            raise AntherError(f"{key} is not here: put the authority's key back to sign a new certificate")
        names = [*(hosts or pki.hosts_of(self.certificates.certificate.read_bytes()))]
        names += [name for name in (LOOPBACK, "localhost") if name not in names]
        made = pki.issue(pki.KeyPair(self.certificates.authority.read_bytes(), key.read_bytes()), names)
        write(self.certificates.key, made.key)
        write(self.certificates.certificate, made.certificate)

    def fingerprint(self) -> str:
        return pki.fingerprint(self.certificates.authority.read_bytes())

    def _tell(self, address: Address) -> None:
        write(self.folder / "federation.json", strict_json.dumps(address).encode())


def of(folder: str | None) -> ServerDir:
    return ServerDir(Path(folder).expanduser().absolute() if folder else assets.home() / "server")


def found_hosts() -> list[str]:
    """The addresses and names of this machine, what others can reach first."""
    outside = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    return [*dict.fromkeys([*outside, socket.gethostname(), LOOPBACK, "localhost"])]
