"""Certificates: a federation's own authority, which devices identify by its fingerprint, and its server's certificate.

Keys are EC P-256. The authority's key signs only server certificates. It may be kept elsewhere, and is needed again
only to renew a server certificate.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import AntherError

AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
_SKEW = timedelta(hours=24)  # clocks of small boards without a battery run behind


class Certificates(NamedTuple):
    """Certificate files, in the order of Flower's options."""

    authority: Path
    certificate: Path
    key: Path


class KeyPair(NamedTuple):
    """A certificate and its private key, in PEM."""

    certificate: bytes
    key: bytes


def create_authority(name: str) -> KeyPair:
    """Create a new authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pair(certificate, key)


def issue(by: KeyPair, hosts: Sequence[str], *, days: int = SERVER_DAYS) -> KeyPair:
    """Create a certificate for a server with these names and addresses.

    Args:
        by: certificate and key of the authority.
        hosts: names and addresses.
        days: validity.

    Raises:
        AntherError: `hosts` is empty, or one of them is neither a name nor an address.
    """
    if not hosts:
        raise AntherError(
            "a certificate needs the names or addresses at which devices reach this server: server.hostnames"
        )
    signer = x509.load_pem_x509_certificate(by.certificate)
    signing = load_pem_private_key(by.key, password=None)
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise AntherError("the authority's key is not of the kind that Anther creates: run anther keys init")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = (
        _builder(subject, signer.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        .sign(signing, hashes.SHA256())
    )
    return _pair(certificate, key)


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 of a certificate (PEM) in hexadecimal, with which a ticket identifies the authority."""
    return hashlib.sha256(x509.load_pem_x509_certificate(certificate).public_bytes(Encoding.DER)).hexdigest()


def days_left(certificate: bytes, now: datetime) -> float:
    """Return the days until a certificate (PEM) expires."""
    return (x509.load_pem_x509_certificate(certificate).not_valid_after_utc - now) / timedelta(days=1)


def hosts_of(certificate: bytes) -> list[str]:
    """List the names and addresses in a server's certificate."""
    extensions = x509.load_pem_x509_certificate(certificate).extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise AntherError(f"{host!r}: neither a host name nor an IP address: correct server.hostnames") from None


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> KeyPair:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return KeyPair(certificate.public_bytes(Encoding.PEM), private)
