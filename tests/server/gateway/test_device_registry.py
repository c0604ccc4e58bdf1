"""Tickets work once, holders have so many devices, and who was shut out stays out."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from common import strict_json
from common.atomic_files import write
from common.errors import AntherError
from server.gateway import keys
from server.gateway.device_registry import FILE, DeviceRegistry, ticket_name
from server.supervisor.server_dir import ServerAddress


def test_a_ticket_works_once_and_its_reply_may_be_lost(tmp_path):
    registry = DeviceRegistry(tmp_path)
    secret = registry.issue("ada")
    member = registry.enroll(secret, "key a", "pi")
    assert registry.enroll(secret, "key a", "pi") == member, "asked again by the same device"
    with pytest.raises(AntherError, match="works only once"):
        registry.enroll(secret, "key b", "other")
    assert registry.snapshot().find("key a") == member
    assert registry.snapshot().find("key b") is None


def test_of_many_that_come_with_one_ticket_one_is_in(tmp_path):
    registry = DeviceRegistry(tmp_path)
    secret = registry.issue("ada")

    def come(number):
        try:
            return DeviceRegistry(tmp_path).enroll(secret, f"key {number}", f"device {number}")
        except AntherError:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(come, range(16)))
    assert sum(member is not None for member in found) == 1
    assert len(registry.snapshot().members) == 1


def test_a_holder_has_so_many_devices_and_open_tickets(tmp_path):
    registry = DeviceRegistry(tmp_path, per_holder=2)
    first, _ = registry.issue("ada"), registry.issue("ada")
    with pytest.raises(AntherError, match="the maximum is 2"):
        registry.issue("ada")
    registry.issue("ben")
    registry.enroll(first, "key", "pi")
    registry.revoke("pi")
    registry.issue("ada")


def test_fewer_are_allowed_than_tickets_were_given(tmp_path):
    registry = DeviceRegistry(tmp_path, per_holder=2)
    secrets = [registry.issue("ada") for _ in range(2)]
    strict = DeviceRegistry(tmp_path, per_holder=1)
    strict.enroll(secrets[0], "key a", "a")
    with pytest.raises(AntherError, match="which is the maximum"):
        strict.enroll(secrets[1], "key b", "b")


def test_an_old_ticket_is_refused(tmp_path):
    registry = DeviceRegistry(tmp_path)
    secret = registry.issue("ada", days=1e-9)
    with pytest.raises(AntherError, match="expired"):
        registry.enroll(secret, "key", "pi")


def test_names_and_keys_are_not_taken_twice(tmp_path):
    registry = DeviceRegistry(tmp_path)
    registry.enroll(registry.issue("ada"), "key", "pi")
    with pytest.raises(AntherError, match="another device is called pi"):
        registry.enroll(registry.issue("ada"), "key b", "pi")
    with pytest.raises(AntherError, match="known here already"):
        registry.enroll(registry.issue("ada"), "key", "pi-2")


def test_a_name_stays_with_its_key(tmp_path):
    registry = DeviceRegistry(tmp_path)
    secret = registry.issue("ada")
    registry.enroll(secret, "key", "pi")
    with pytest.raises(AntherError, match=r"this device is enrolled as pi; .* use name=pi"):
        registry.enroll(secret, "key", "pi-2")
    assert [member.name for member in registry.snapshot().active_devices().values()] == ["pi"]
    registry.revoke("pi")


def test_an_open_ticket_can_be_voided_by_its_name(tmp_path, capsys):
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
    registry.issue("ada")  # its place is free again
    assert len(registry.snapshot().members) == 1


def test_a_ticket_that_is_voided_while_it_is_used(tmp_path, monkeypatch):
    registry = DeviceRegistry(tmp_path)
    secret, before = registry.issue("ada"), registry.snapshot()
    registry.revoke(next(iter(map(ticket_name, before.tickets))))
    looks = [before]  # what whoever enrols saw just before
    snapshot = DeviceRegistry.snapshot
    monkeypatch.setattr(DeviceRegistry, "snapshot", lambda self: looks.pop() if looks else snapshot(self))
    with pytest.raises(AntherError, match="no such ticket"):
        registry.enroll(secret, "key a", "pi")


def test_who_was_revoked_stays_out_and_its_name_is_free(tmp_path):
    registry = DeviceRegistry(tmp_path)
    registry.enroll(registry.issue("ada"), "key", "pi")
    registry.revoke("pi")
    assert registry.snapshot().find("key") is None
    assert registry.snapshot().active_devices() == {}
    with pytest.raises(AntherError, match="was revoked"):
        registry.enroll(registry.issue("ada"), "key", "pi")
    registry.enroll(registry.issue("ada"), "key b", "pi")
    with pytest.raises(AntherError, match="no such device"):
        registry.revoke("nobody")


def test_another_process_sees_it_at_once(tmp_path):
    watching, writing = DeviceRegistry(tmp_path), DeviceRegistry(tmp_path)
    assert watching.snapshot().members == {}
    writing.enroll(writing.issue("ada"), "key", "pi")
    assert watching.snapshot().find("key")
    writing.revoke("pi")
    assert watching.snapshot().find("key") is None


def test_no_secret_lies_on_the_disk(tmp_path):
    registry = DeviceRegistry(tmp_path)
    secret = registry.issue("ada")
    assert secret not in (tmp_path / FILE).read_text()
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0
    until = datetime.fromisoformat(next(iter(json.loads((tmp_path / FILE).read_text())["tickets"].values()))["expires"])
    assert timedelta(days=6.9) < until - datetime.now(UTC) < timedelta(days=7.1)


def test_a_damaged_register_is_named(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(AntherError, match="is damaged"):
        DeviceRegistry(tmp_path).snapshot()
