"""Certificates, held against OpenSSL's own view of them: a TLS handshake."""

import ssl
from datetime import UTC, datetime, timedelta

import pytest

from common.errors import AntherError
from server.gateway import pki
from server.supervisor.server_dir import ServerDir


def shake(server: pki.KeyPair, trusted: bytes, name: str, folder) -> None:
    """A handshake in memory; ssl.SSLError if the client doesn't trust it."""
    (folder / "crt").write_bytes(server.certificate)
    (folder / "key").write_bytes(server.key)
    offering = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    offering.load_cert_chain(folder / "crt", folder / "key")
    asking = ssl.create_default_context(cadata=trusted.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(down, up, server_hostname=name)
    other = offering.wrap_bio(up, down, server_side=True)
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


def test_who_trusts_the_authority_trusts_its_server_and_no_other(authority, tmp_path):
    server = pki.issue(authority, ["pi.local", "127.0.0.1"])
    shake(server, authority.certificate, "pi.local", tmp_path)
    shake(server, authority.certificate, "127.0.0.1", tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server, authority.certificate, "elsewhere.local", tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server, pki.create_authority("another").certificate, "pi.local", tmp_path)


def test_a_servers_certificate_signs_nothing(authority, tmp_path):
    server = pki.issue(authority, ["pi.local"])
    forged = pki.issue(server, ["pi.local"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(forged, authority.certificate, "pi.local", tmp_path)


@pytest.mark.parametrize("hosts", [[], ["bücher.example"]])
def test_what_is_no_host_is_refused(authority, hosts):
    with pytest.raises(AntherError):
        pki.issue(authority, hosts)


def test_rotation_changes_the_server_and_not_the_authority(tmp_path):
    place = ServerDir(tmp_path)
    place.prepare(["pi.local"], 9443)
    before, fingerprint = place.certificates.certificate.read_bytes(), place.fingerprint()
    place.prepare([], 9443)
    assert place.certificates.certificate.read_bytes() == before, "started again, nothing changes"
    place.rotate()
    after = place.certificates.certificate.read_bytes()
    assert after != before
    assert place.fingerprint() == fingerprint
    assert pki.hosts_of(after)[0] == "pi.local"
    place.prepare(["other.local"], 9443)
    assert "other.local" in pki.hosts_of(place.certificates.certificate.read_bytes())
    assert place.certificates.key.stat().st_mode & 0o077 == 0


def test_a_certificate_that_ends_soon_is_made_anew(tmp_path):
    place = ServerDir(tmp_path)
    place.prepare(["pi.local"], 9443)
    authority = pki.KeyPair(place.certificates.authority.read_bytes(), (tmp_path / "authority.key").read_bytes())
    place.certificates.certificate.write_bytes(pki.issue(authority, ["pi.local"], days=10).certificate)
    place.prepare([], 9443)
    left = pki.days_left(place.certificates.certificate.read_bytes(), datetime.now(UTC))
    assert left > pki.SERVER_DAYS - 2
    (tmp_path / "authority.key").unlink()
    with pytest.raises(AntherError, match="authority's key"):
        place.rotate()
    assert pki.days_left(authority.certificate, datetime.now(UTC) + timedelta(days=1)) > 3600
