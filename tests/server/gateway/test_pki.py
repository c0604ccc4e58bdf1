"""Certificates, verified by TLS handshakes with OpenSSL."""

import ssl
from datetime import UTC, datetime, timedelta

import pytest

from common.errors import AntherError
from server.gateway import pki
from server.supervisor.server_dir import ServerDir


def handshake(server: pki.KeyPair, trusted: bytes, name: str, folder) -> None:
    """Perform a handshake in memory; ssl.SSLError if the client doesn't trust the server."""
    (folder / "crt").write_bytes(server.certificate)
    (folder / "key").write_bytes(server.key)
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_context.load_cert_chain(folder / "crt", folder / "key")
    client_context = ssl.create_default_context(cadata=trusted.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(down, up, server_hostname=name)
    other = server_context.wrap_bio(up, down, server_side=True)
    for _ in range(8):
        for side in (client, other):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    client.write(b"x")
    assert other.read(1) == b"x"


@pytest.fixture(scope="module")
def authority():
    return pki.create_authority("a test's")


def test_authority_verifies_only_its_server(authority, tmp_path):
    server = pki.issue(authority, ["pi.local", "127.0.0.1"])
    handshake(server, authority.certificate, "pi.local", tmp_path)
    handshake(server, authority.certificate, "127.0.0.1", tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, authority.certificate, "elsewhere.local", tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, pki.create_authority("another").certificate, "pi.local", tmp_path)


def test_server_certificate_cannot_sign(authority, tmp_path):
    server = pki.issue(authority, ["pi.local"])
    forged = pki.issue(server, ["pi.local"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(forged, authority.certificate, "pi.local", tmp_path)


@pytest.mark.parametrize("hosts", [[], ["bücher.example"]])
def test_invalid_host_is_refused(authority, hosts):
    with pytest.raises(AntherError):
        pki.issue(authority, hosts)


def test_rotation_keeps_the_authority(tmp_path):
    directory = ServerDir(tmp_path)
    directory.prepare(["pi.local"], 9443)
    before, fingerprint = directory.certificates.certificate.read_bytes(), directory.fingerprint()
    directory.prepare([], 9443)
    assert directory.certificates.certificate.read_bytes() == before, "a restart changes nothing"
    directory.rotate()
    after = directory.certificates.certificate.read_bytes()
    assert after != before
    assert directory.fingerprint() == fingerprint
    assert pki.hosts_of(after)[0] == "pi.local"
    directory.prepare(["other.local"], 9443)
    assert "other.local" in pki.hosts_of(directory.certificates.certificate.read_bytes())
    assert directory.certificates.key.stat().st_mode & 0o077 == 0


def test_expiring_certificate_is_replaced(tmp_path):
    directory = ServerDir(tmp_path)
    directory.prepare(["pi.local"], 9443)
    authority = pki.KeyPair(directory.certificates.authority.read_bytes(), (tmp_path / "authority.key").read_bytes())
    directory.certificates.certificate.write_bytes(pki.issue(authority, ["pi.local"], days=10).certificate)
    directory.prepare([], 9443)
    days = pki.days_left(directory.certificates.certificate.read_bytes(), datetime.now(UTC))
    assert days > pki.SERVER_DAYS - 2
    (tmp_path / "authority.key").unlink()
    with pytest.raises(AntherError, match="authority's key"):
        directory.rotate()
    assert pki.days_left(authority.certificate, datetime.now(UTC) + timedelta(days=1)) > 3600
