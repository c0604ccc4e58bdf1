"""Tickets work once, devices per holder are limited, and revocation is permanent."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from common import strict_json
from common.atomic_files import write
from common.errors import AntherError
from server.gateway.device_registry import FILE, DeviceRegistry, ticket_name
from server.supervisor import keys
from server.supervisor.server_dir import ServerAddress


def test_ticket_works_once_even_if_reply_is_lost(tmp_path):
    registry = DeviceRegistry(tmp_path)
    secret = registry.issue("ada")
    member = registry.enroll(secret, "key a", "pi")
    assert registry.enroll(secret, "key a", "pi") == member, "same device again"
    with pytest.raises(AntherError, match="works only once"):
        registry.enroll(secret, "key b", "other")
    assert registry.snapshot().find("key a") == member
    assert registry.snapshot().find("key b") is None


def test_concurrent_enrollments_with_one_ticket(tmp_path):
    registry = DeviceRegistry(tmp_path)
    secret = registry.issue("ada")

    def enroll(number):
        try:
            return DeviceRegistry(tmp_path).enroll(secret, f"key {number}", f"device {number}")
        except AntherError:
            return None

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(enroll, range(16)))
    assert sum(member is not None for member in results) == 1
    assert len(registry.snapshot().members) == 1


def test_limit_per_holder(tmp_path):
    registry = DeviceRegistry(tmp_path, per_holder=2)
    first, _ = registry.issue("ada"), registry.issue("ada")
    with pytest.raises(AntherError, match="the maximum is 2"):
        registry.issue("ada")
    registry.issue("ben")
    registry.enroll(first, "key", "pi")
    registry.revoke("pi")
    registry.issue("ada")


def test_limit_below_issued_tickets(tmp_path):
    registry = DeviceRegistry(tmp_path, per_holder=2)
    secrets = [registry.issue("ada") for _ in range(2)]
    strict = DeviceRegistry(tmp_path, per_holder=1)
    strict.enroll(secrets[0], "key a", "a")
    with pytest.raises(AntherError, match="which is the maximum"):
        strict.enroll(secrets[1], "key b", "b")


def test_expired_ticket_is_refused(tmp_path):
    registry = DeviceRegistry(tmp_path)
    secret = registry.issue("ada", days=1e-9)
    with pytest.raises(AntherError, match="expired"):
        registry.enroll(secret, "key", "pi")


def test_names_and_keys_are_unique(tmp_path):
    registry = DeviceRegistry(tmp_path)
    registry.enroll(registry.issue("ada"), "key", "pi")
    with pytest.raises(AntherError, match="another device is called pi"):
        registry.enroll(registry.issue("ada"), "key b", "pi")
    with pytest.raises(AntherError, match="already enrolled"):
        registry.enroll(registry.issue("ada"), "key", "pi-2")


def test_name_stays_with_its_key(tmp_path):
    registry = DeviceRegistry(tmp_path)
    secret = registry.issue("ada")
    registry.enroll(secret, "key", "pi")
    with pytest.raises(AntherError, match=r"this device is enrolled as pi; .* use name=pi"):
        registry.enroll(secret, "key", "pi-2")
    assert [member.name for member in registry.snapshot().active_devices().values()] == ["pi"]
    registry.revoke("pi")


def test_open_ticket_is_voided_by_name(tmp_path, capsys):
    registry = DeviceRegistry(tmp_path, per_holder=2)
    registry.enroll(registry.issue("ada"), "key", "pi")
    void, _ = registry.issue("ada"), registry.issue("ben")
    write(tmp_path / "federation.json", strict_json.dumps(ServerAddress(federation="f", host="h", port=1)).encode())
    assert keys.main(["list", "--folder", str(tmp_path)]) == 0
    device, *tickets = capsys.readouterr().out.splitlines()
    assert device.startswith("pi  of ada")
    name = next(line.split()[0] for line in tickets if "open, of ada" in line)
    assert void not in "".join(tickets)
    assert keys.main(["revoke", name, "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{name} can no longer be used to enroll.\n"
    with pytest.raises(AntherError, match="no such ticket"):
        registry.enroll(void, "another key", "b")
    with pytest.raises(AntherError, match="no such device or open ticket"):
        registry.revoke(name)
    registry.issue("ada")  # the voided ticket no longer counts
    assert len(registry.snapshot().members) == 1


def test_ticket_voided_during_enrollment(tmp_path, monkeypatch):
    registry = DeviceRegistry(tmp_path)
    secret, before = registry.issue("ada"), registry.snapshot()
    registry.revoke(next(iter(map(ticket_name, before.tickets))))
    snapshots = [before]  # seen by the enrolling process just before
    snapshot = DeviceRegistry.snapshot
    monkeypatch.setattr(DeviceRegistry, "snapshot", lambda self: snapshots.pop() if snapshots else snapshot(self))
    with pytest.raises(AntherError, match="no such ticket"):
        registry.enroll(secret, "key a", "pi")


def test_revoked_key_stays_out_and_name_is_free(tmp_path):
    registry = DeviceRegistry(tmp_path)
    registry.enroll(registry.issue("ada"), "key", "pi")
    registry.revoke("pi")
    assert registry.snapshot().find("key") is None
    assert registry.snapshot().active_devices() == {}
    with pytest.raises(AntherError, match="was revoked"):
        registry.enroll(registry.issue("ada"), "key", "pi")
    registry.enroll(registry.issue("ada"), "key b", "pi")
    with pytest.raises(AntherError, match="no such device"):
        registry.revoke("unknown")


def test_other_process_sees_changes(tmp_path):
    reader, writer = DeviceRegistry(tmp_path), DeviceRegistry(tmp_path)
    assert reader.snapshot().members == {}
    writer.enroll(writer.issue("ada"), "key", "pi")
    assert reader.snapshot().find("key")
    writer.revoke("pi")
    assert reader.snapshot().find("key") is None


def test_secrets_are_not_stored(tmp_path):
    registry = DeviceRegistry(tmp_path)
    secret = registry.issue("ada")
    assert secret not in (tmp_path / FILE).read_text()
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0
    until = datetime.fromisoformat(next(iter(json.loads((tmp_path / FILE).read_text())["tickets"].values()))["expires"])
    assert timedelta(days=6.9) < until - datetime.now(UTC) < timedelta(days=7.1)


def test_damaged_file_is_named(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(AntherError, match="is damaged"):
        DeviceRegistry(tmp_path).snapshot()
