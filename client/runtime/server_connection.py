"""A device's connection to its federation's gateway: its key, the trusted authority, and requests outside of Flower.

Files in ANTHER_HOME: `node.conf`, the device's configuration, and `link/` with `ca.pem` and `node.key`, readable by the
owner only.
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

from client import paths
from common import strict_json
from common.atomic_files import write
from common.errors import AntherError, shorten
from protocol.handshake import Enrollment, ServerHello
from protocol.messages import NEWEST
from protocol.ticket import Ticket

_TIMEOUT = 30.0  # seconds without a byte
_DEADLINE = 60.0  # seconds for a complete response
MAX_RESPONSE_BYTES = 64 * 1024
"""Maximum bytes of a response."""
_SKEW = 240.0  # seconds: Flower refuses signatures that are five minutes off


class ServerUnavailable(AntherError):  # noqa: N818 - not an error
    """The server doesn't respond now; a later attempt may succeed."""


class Unauthorized(AntherError):  # noqa: N818
    """The server doesn't know this device."""


@dataclass(frozen=True)
class ServerConnection:
    """A device's connection to the server of one federation.

    Args:
        address: host:port of the server.
        insecure: plain HTTP, without keys.
    """

    address: str
    insecure: bool = False

    @property
    def authority(self) -> Path:
        """Certificate of the federation's authority."""
        return paths.keys_folder() / "ca.pem"

    @property
    def key(self) -> Path:
        """This device's private key."""
        return paths.keys_folder() / "node.key"

    def client(self, *, signed: bool = False) -> httpx.Client:
        """Return an HTTP client for this server only; a server with another certificate is refused.

        Args:
            signed: sign each request with the device's key.
        """
        if self.insecure:
            return httpx.Client(base_url=f"http://{self.address}", timeout=_TIMEOUT, trust_env=False)
        try:
            trusted = ssl.create_default_context(cafile=str(self.authority))
        except (OSError, ssl.SSLError) as error:
            raise AntherError(f"{self.authority}: can't be read ({error}): enroll again with a new ticket") from error
        return httpx.Client(
            base_url=f"https://{self.address}",
            timeout=_TIMEOUT,
            verify=trusted,
            trust_env=False,
            auth=_Signed(private_key(self.key)) if signed else None,
        )

    def hello(self) -> ServerHello:
        """Ask the server for its version, base and clock.

        Raises:
            ServerUnavailable: it doesn't respond.
            AntherError: it isn't the server that the ticket was for, or its version differs; the message states the
                remedy.
        """
        with self.client() as client:
            return _parse_hello(_fetch(client, "GET", "/v1/anther/hello", self.address))

    def check_in(self) -> None:
        """Raise AntherError if this device isn't enrolled, or was revoked."""
        if self.insecure:
            return
        with self.client(signed=True) as client:
            try:
                _fetch(client, "GET", "/v1/anther/in", self.address)
            except Unauthorized as error:
                raise AntherError(
                    f"{self.address}: this device isn't enrolled there, or was revoked: ask its operator for a ticket"
                ) from error


class _Signed(httpx.Auth):
    """Request headers that prove the sender's identity and the time."""

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
    """Return the seconds by which this device's clock is ahead of the server's; 0 if Flower accepts the difference."""
    server_time = hello.clock()
    difference = 0.0 if server_time is None else (datetime.now(UTC) - server_time).total_seconds()
    return difference if abs(difference) > _SKEW else 0.0


def enroll(ticket: Ticket, name: str) -> tuple[ServerConnection, ServerHello]:
    """Join a federation: verify the authority by the ticket's fingerprint, then send the ticket's secret and our key.

    After a crash or a lost reply it can be repeated with the same result.

    Raises:
        ServerUnavailable: as in `ServerConnection.hello`.
        AntherError: as there, or the ticket is refused; the message has the reason.
    """
    connection = ServerConnection(ticket.address)
    pem = _authority(ticket)
    if not connection.key.exists() or not connection.authority.exists() or connection.authority.read_bytes() != pem:
        # A new key for each federation: a shared one would link the device across federations.
        write(connection.key, _new_key())
        write(connection.authority, pem)
    connection.hello().check()
    public = private_key(connection.key).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    enrollment = Enrollment(protocol=NEWEST, secret=ticket.secret, key=public, name=name)
    with connection.client() as client:
        hello = _parse_hello(
            _fetch(client, "POST", "/v1/anther/enrol", ticket.address, content=strict_json.dumps(enrollment))
        )
    hello.check()
    return connection, hello


def private_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """Load the device's private key."""
    try:
        key = load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise AntherError(f"{file}: can't be read ({error}): enroll again with a new ticket") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AntherError(f"{file}: not an elliptic-curve key: enroll again with a new ticket")
    return key


def _new_key() -> bytes:
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def _authority(ticket: Ticket) -> bytes:
    """Download the authority's certificate, unverified; it is trusted only if it has the ticket's fingerprint."""
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    with httpx.Client(
        base_url=f"https://{ticket.address}", verify=unverified, timeout=_TIMEOUT, trust_env=False
    ) as client:
        pem = _fetch(client, "GET", "/v1/anther/ca", ticket.address).encode()
    try:
        certificate = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    except ValueError:
        certificate = b""
    if hashlib.sha256(certificate).hexdigest() != ticket.fingerprint:
        raise AntherError(
            f"{ticket.address}: this is not the server that the ticket is for: don't continue, and ask its operator"
        )
    return pem


class _Response(NamedTuple):
    status: int
    text: str


def _fetch(client: httpx.Client, method: str, path: str, address: str, **arguments: str) -> str:
    """Return the response's text; AntherError with the server's reason if it refuses.

    Args:
        client: HTTP client of the server.
        method: HTTP method.
        path: path of the request.
        address: host:port, for messages.
        arguments: further arguments of `httpx.Client.stream`.

    Raises:
        ServerUnavailable: no response, or the server is overloaded.
        Unauthorized: the server doesn't know this device.
        AntherError: any other refusal, or another server's certificate.
    """
    try:
        response = _with_deadline(_DEADLINE, client, lambda: _read(client, method, path, **arguments))
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise AntherError(
                f"{address}: this is not the server that this device was enrolled with, or its certificate has "
                f"expired or is for another name ({error}): ask its operator for a new ticket"
            ) from error
        raise ServerUnavailable(f"{address}: no response ({shorten(error)})") from error
    if response.status in (502, 503, 504):
        raise ServerUnavailable(f"{address}: {shorten(response.text, 200)}")
    if response.status == 401:
        raise Unauthorized(f"{address}: {_reason(response)}")
    if response.status != 200:
        raise AntherError(f"{address}: {_reason(response)}")
    return response.text


def _read(client: httpx.Client, method: str, path: str, **arguments: str) -> _Response:
    """Read a response, as sent and never decompressed, up to `MAX_RESPONSE_BYTES`."""
    headers = {"Accept-Encoding": "identity"}
    with client.stream(method, path, headers=headers, **arguments) as reply:  # type: ignore[arg-type]
        data = bytearray()
        for piece in reply.iter_raw():
            data += piece
            if len(data) > MAX_RESPONSE_BYTES:
                raise AntherError(
                    f"{client.base_url.netloc.decode()}: a response of over {MAX_RESPONSE_BYTES} bytes: not an Anther "
                    "server"
                )
        return _Response(reply.status_code, data.decode(errors="replace"))


def _with_deadline(seconds: float, client: httpx.Client, work: Callable[[], _Response]) -> _Response:
    """Return the result of `work`; ServerUnavailable after a deadline: httpx limits a single pause, not their sum.

    Args:
        seconds: the deadline.
        client: closed when the deadline has passed.
        work: reads the response.
    """
    future: Future[_Response] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        client.close()
        raise ServerUnavailable(f"{client.base_url.netloc.decode()}: no complete response in {seconds:.0f} s") from None


def _reason(response: _Response) -> str:
    """Return the server's reason for a refusal."""
    try:
        return shorten(strict_json.loads(response.text)["error"], 400)
    except (ValueError, KeyError, TypeError):
        return f"answered {response.status}: check that an Anther server uses this address"


def _parse_hello(text: str) -> ServerHello:
    """Parse the server's hello; AntherError if it is malformed."""
    try:
        return strict_json.from_plain(ServerHello, strict_json.loads(text))
    except ValueError as error:
        reason = shorten(error)
        raise AntherError(
            f"the server's response can't be read ({reason}): update Anther on the device or on the server"
        ) from error
