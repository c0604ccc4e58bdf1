"""Who a device is: by a signature with the key that it was enrolled with.

The same headers that Flower's SuperNode signs with, the time as ISO 8601, so that one key and one rule serve both.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)

from conf.errors import AntherError

KEY, TIME, SIGNATURE = "flwr-public-key", "flwr-timestamp", "flwr-signature"
TOLERANCE = 300.0  # seconds that clocks may differ


def canonical(key: str) -> str:
    """A public key in OpenSSH's form without its comment; AntherError unless it is an EC key of 384 bits."""
    try:
        found = load_ssh_public_key(key.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, ec.EllipticCurvePublicKey) or found.curve.name != "secp384r1":
        raise AntherError("the public key must be ecdsa-sha2-nistp384, as python -m client.enroll makes it")
    return written(found)


def claimed(headers: Mapping[str, str]) -> str | None:
    """Whose key a request names, in OpenSSH's form; nothing says yet that it is theirs."""
    found = _key(headers.get(KEY, ""))
    return None if found is None else written(found)


def proven(headers: Mapping[str, str], path: str, *, now: datetime | None = None) -> str | None:
    """Whose request it is: the key that signed its path and a time that is near."""
    found, time = _key(headers.get(KEY, "")), headers.get(TIME, "")
    try:
        apart = abs(((now or datetime.now(UTC)) - datetime.fromisoformat(time)).total_seconds())
        if found is None or not apart <= TOLERANCE:
            return None
        signature = base64.b64decode(headers.get(SIGNATURE, ""), validate=True)
        found.verify(signature, f"{time} {path}".encode(), ec.ECDSA(hashes.SHA256()))
    except (ValueError, TypeError, InvalidSignature):
        return None
    return written(found)


@functools.lru_cache(maxsize=1024)
def _key(header: str) -> ec.EllipticCurvePublicKey | None:
    try:
        found = load_pem_public_key(base64.b64decode(header, validate=True))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return found if isinstance(found, ec.EllipticCurvePublicKey) else None


def written(key: Any) -> str:
    """A public key in OpenSSH's form, without a comment."""
    text: bytes = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return text.decode()
