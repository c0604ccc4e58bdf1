"""A device's side of a federation's gateway: its key, the authority it trusts, and what it asks before Flower does.

In ANTHER_HOME: `node.conf`, the words of its configuration, and `link/` with `ca.pem` and `node.key`, for its owner's
eyes only.
"""

from __future__ import annotations

import base64
import hashlib
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from client.cli import paths
from common import strict_json
from common.atomic_files import write
from common.errors import AntherError, shown
from protocol.handshake import Enrollment, ServerHello
from protocol.messages import NEWEST
from protocol.ticket import Ticket

_TIMEOUT = 30.0  # seconds without a byte
_DEADLINE = 60.0  # seconds for a whole answer
LONGEST = 64 * 1024
"""Bytes of an answer."""
_SKEW = 240.0  # seconds: Flower refuses what is signed five minutes off


class ServerUnavailable(AntherError):  # noqa: N818 - nothing is wrong
    """Nobody answers now; later somebody may."""


class Unauthorized(AntherError):  # noqa: N818
    """The server doesn't know who asks."""


@dataclass(frozen=True)
class ServerConnection:
    """What a device holds of one federation.

    Args:
        address: host:port of its server.
        insecure: plain HTTP, without keys.
    """

    address: str
    insecure: bool = False

    @property
    def authority(self) -> Path:
        return paths.link() / "ca.pem"

    @property
    def key(self) -> Path:
        return paths.link() / "node.key"

    def client(self, *, signed: bool = False) -> httpx.Client:
        """For requests to this server and no other: whoever else answers is refused.

        Args:
            signed: prove with each request who asks.
        """
        if self.insecure:
            return httpx.Client(base_url=f"http://{self.address}", timeout=_TIMEOUT, trust_env=False)
        try:
            trusted = ssl.create_default_context(cafile=str(self.authority))
        except (OSError, ssl.SSLError) as error:
            raise AntherError(f"{self.authority}: can't be read ({error}): enrol again with a new ticket") from error
        return httpx.Client(
            base_url=f"https://{self.address}",
            timeout=_TIMEOUT,
            verify=trusted,
            trust_env=False,
            auth=_Signed(private_key(self.key)) if signed else None,
        )

    def hello(self) -> ServerHello:
        """What the server says of itself.

        Raises:
            Unreachable: it doesn't answer.
            AntherError: it is another than the ticket was for, or speaks another version; what to do is said.
        """
        with self.client() as client:
            return _understood(_asked(client, "GET", "/v1/anther/hello", self.address))

    def check_in(self) -> None:
        """AntherError if this device isn't let in, or no longer."""
        if self.insecure:
            return
        with self.client(signed=True) as client:
            try:
                _asked(client, "GET", "/v1/anther/in", self.address)
            except Unauthorized as error:
                raise AntherError(
                    f"{self.address}: this device isn't enrolled there, or was revoked: ask the operator for a ticket"
                ) from error


class _Signed(httpx.Auth):
    """Headers that prove who asks for a path, and when."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        time = datetime.now(UTC).isoformat()
        signature = self._key.sign(f"{time} {request.url.path}".encode(), ec.ECDSA(hashes.SHA256()))
        request.headers["flwr-public-key"] = base64.b64encode(self._public).decode()
        request.headers["flwr-timestamp"] = time
        request.headers["flwr-signature"] = base64.b64encode(signature).decode()
        yield request


def skew(hello: ServerHello) -> float:
    """Seconds by which this device's clock is ahead of the server's, where it is so far off that Flower would refuse
    it; else 0.
    """
    theirs = hello.clock()
    apart = 0.0 if theirs is None else (datetime.now(UTC) - theirs).total_seconds()
    return apart if abs(apart) > _SKEW else 0.0


def enroll(ticket: Ticket, name: str) -> tuple[ServerConnection, ServerHello]:
    """Come in with a ticket: the server's authority is believed by its fingerprint, then told the secret and our key.

    Done again after a crash or a lost reply it comes to the same.

    Raises:
        Unreachable, AntherError: as `ServerConnection.hello`, or the ticket is refused with the reason.
    """
    link = ServerConnection(ticket.address)
    pem = _authority(ticket)
    if not link.key.exists() or not link.authority.exists() or link.authority.read_bytes() != pem:
        write(link.key, _new_key())  # a federation doesn't learn by its key that a device was in another
        write(link.authority, pem)
    link.hello().check()
    public = private_key(link.key).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    asked = Enrollment(protocol=NEWEST, secret=ticket.secret, key=public, name=name)
    with link.client() as client:
        found = _understood(
            _asked(client, "POST", "/v1/anther/enrol", ticket.address, content=strict_json.dumps(asked))
        )
    found.check()
    return link, found


def private_key(file: Path) -> ec.EllipticCurvePrivateKey:
    try:
        found = load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise AntherError(f"{file}: can't be read ({error}): enrol again with a new ticket") from error
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise AntherError(f"{file}: not a key of ours: enrol again with a new ticket")
    return found


def _new_key() -> bytes:
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def _authority(ticket: Ticket) -> bytes:
    """The authority's certificate, from whoever answers: believed only if it is the one that the ticket names."""
    nobody_known = ssl.create_default_context()
    nobody_known.check_hostname, nobody_known.verify_mode = False, ssl.CERT_NONE
    with httpx.Client(
        base_url=f"https://{ticket.address}", verify=nobody_known, timeout=_TIMEOUT, trust_env=False
    ) as client:
        pem = _asked(client, "GET", "/v1/anther/ca", ticket.address).encode()
    try:
        found = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    except ValueError:
        found = b""
    if hashlib.sha256(found).hexdigest() != ticket.fingerprint:
        raise AntherError(
            f"{ticket.address}: another server answers than this ticket is for: ask its operator, and don't go on"
        )
    return pem


class _Answer(NamedTuple):
    status: int
    text: str


def _asked(client: httpx.Client, method: str, path: str, address: str, **more: str) -> str:
    """What is answered; AntherError where it is a no, with the server's reason."""
    try:
        found = _within(_DEADLINE, client, lambda: _read(client, method, path, **more))
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise AntherError(
                f"{address}: another server answers than the one that this device was enrolled with, or its "
                f"certificate is for another name or over ({error}): ask its operator for a new ticket"
            ) from error
        raise ServerUnavailable(f"{address}: no answer ({shown(error)})") from error
    if found.status in (502, 503, 504):
        raise ServerUnavailable(f"{address}: {shown(found.text, 200)}")
    if found.status == 401:
        raise Unauthorized(f"{address}: {_reason(found)}")
    if found.status != 200:
        raise AntherError(f"{address}: {_reason(found)}")
    return found.text


def _read(client: httpx.Client, method: str, path: str, **more: str) -> _Answer:
    """An answer, of which no more is read than any of ours has, as it comes: nothing is unpacked."""
    plainly = {"Accept-Encoding": "identity"}
    with client.stream(method, path, headers=plainly, **more) as reply:  # type: ignore[arg-type]
        data = bytearray()
        for piece in reply.iter_raw():
            data += piece
            if len(data) > LONGEST:
                raise AntherError(f"{client.base_url.netloc.decode()}: an answer of over {LONGEST} bytes: not Anther's")
        return _Answer(reply.status_code, data.decode(errors="replace"))


def _within(seconds: float, client: httpx.Client, work: Callable[[], _Answer]) -> _Answer:
    """What `work` comes to; Unreachable if it takes longer: a time without a byte is bounded by httpx, but not many."""
    found: Future[_Answer] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return found.result(seconds)
    except TimeoutError:
        if found.done():
            raise
        client.close()
        raise ServerUnavailable(f"{client.base_url.netloc.decode()}: no whole answer in {seconds:.0f} s") from None


def _reason(found: _Answer) -> str:
    try:
        return shown(strict_json.loads(found.text)["error"], 400)
    except (ValueError, KeyError, TypeError):
        return f"answered {found.status}: is an Anther server there?"


def _understood(text: str) -> ServerHello:
    try:
        return strict_json.from_plain(ServerHello, strict_json.loads(text))
    except ValueError as error:
        reason = shown(error)
        raise AntherError(f"the server's greeting can't be read ({reason}): update Anther on the older side") from error
