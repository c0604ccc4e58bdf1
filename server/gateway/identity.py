"""Device identity: a signature with the key that the device was enrolled with.

Flower's SuperNode signs the time; our own calls sign the time and the path, with the same key and headers. Each header
must occur exactly once: if it occurred twice, the gateway and the SuperLink could use different values.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from starlette.datastructures import Headers

from common.errors import AntherError

KEY, TIME, SIGNATURE = "flwr-public-key", "flwr-timestamp", "flwr-signature"
TOLERANCE = 300.0  # seconds that clocks may differ

_CURVE = "secp384r1"
_LONGEST = 512  # characters of a header; an honest key takes 288


@dataclass(frozen=True)
class Claim:
    """A public key that a request names; only its signature proves that the sender has the private key."""

    key: ec.EllipticCurvePublicKey
    name: str
    """The key in OpenSSH's form, as in the register."""
    time: str
    signature: str

    def verify_signature(self, signed: str, *, now: datetime | None = None) -> bool:
        """Return whether the key signed this text, at a time within `TOLERANCE` of the server's clock."""
        try:
            difference = abs(((now or datetime.now(UTC)) - datetime.fromisoformat(self.time)).total_seconds())
            if not difference <= TOLERANCE:
                return False
            signature = base64.b64decode(self.signature, validate=True)
            self.key.verify(signature, signed.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def headers(self) -> dict[str, str]:
        """Return the three headers in Flower's form, regardless of their form in the request."""
        return {KEY: base64.b64encode(pem(self.key)).decode(), TIME: self.time, SIGNATURE: self.signature}


class Caller(NamedTuple):
    """The authenticated node that sent a request."""

    key: str
    """Public key in OpenSSH's form."""
    pem: bytes
    headers: Mapping[str, str]
    """Headers that authenticate the node to the SuperLink. They sign the time, so they are valid for several calls."""
    node: int | None
    """Node id; None if nodes have no keys (without TLS) and the node hasn't registered yet."""


def parse_claim(headers: Headers) -> Claim | None:
    """Return the identity that a request claims; None if a header is missing, duplicate or not a valid key."""
    values = [headers.getlist(name) for name in (KEY, TIME, SIGNATURE)]
    if any(len(header) != 1 or len(header[0]) > _LONGEST for header in values):
        return None
    (key,), (time,), (signature,) = values
    public_key = _load_key(key)
    return None if public_key is None else Claim(public_key, to_openssh(public_key), time, signature)


def authenticate(headers: Headers, path: str, *, now: datetime | None = None) -> str | None:
    """Authenticate a request of our own.

    Args:
        headers: headers of the request.
        path: path of the request.
        now: time of the server (default: the current time).

    Returns:
        The key that signed the path at a time within `TOLERANCE`, in OpenSSH's form; None if there is none.
    """
    claim = parse_claim(headers)
    return claim.name if claim is not None and claim.verify_signature(f"{claim.time} {path}", now=now) else None


def canonical(key: str) -> str:
    """Normalize a public key to OpenSSH's form without its comment.

    Raises:
        AntherError: the key isn't an EC key of 384 bits.
    """
    try:
        public_key = load_ssh_public_key(key.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        public_key = None
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or public_key.curve.name != _CURVE:
        raise AntherError("the public key must be ecdsa-sha2-nistp384: create it with anther device enroll")
    return to_openssh(public_key)


def to_openssh(key: Any) -> str:
    """Return a public key in OpenSSH's form, without a comment."""
    text: bytes = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return text.decode()


@functools.lru_cache(maxsize=1024)
def _load_key(header: str) -> ec.EllipticCurvePublicKey | None:
    try:
        public_key = load_pem_public_key(base64.b64decode(header, validate=True))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return public_key if isinstance(public_key, ec.EllipticCurvePublicKey) and public_key.curve.name == _CURVE else None


def pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key in PEM, as Flower uses it."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
