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
from server.supervisor.server_dir import Address


def test_a_ticket_works_once_and_its_reply_may_be_lost(tmp_path):
    register = DeviceRegistry(tmp_path)
    secret = register.issue("ada")
    member = register.enroll(secret, "key a", "pi")
    assert register.enroll(secret, "key a", "pi") == member, "asked again by the same device"
    with pytest.raises(AntherError, match="works once"):
        register.enroll(secret, "key b", "other")
    assert register.look().find("key a") == member
    assert register.look().find("key b") is None


def test_of_many_that_come_with_one_ticket_one_is_in(tmp_path):
    register = DeviceRegistry(tmp_path)
    secret = register.issue("ada")

    def come(number):
        try:
            return DeviceRegistry(tmp_path).enroll(secret, f"key {number}", f"device {number}")
        except AntherError:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(come, range(16)))
    assert sum(member is not None for member in found) == 1
    assert len(register.look().members) == 1


def test_a_holder_has_so_many_devices_and_open_tickets(tmp_path):
    register = DeviceRegistry(tmp_path, per_holder=2)
    first, _ = register.issue("ada"), register.issue("ada")
    with pytest.raises(AntherError, match="2 are the most"):
        register.issue("ada")
    register.issue("ben")
    register.enroll(first, "key", "pi")
    register.revoke("pi")
    register.issue("ada")


def test_fewer_are_allowed_than_tickets_were_given(tmp_path):
    register = DeviceRegistry(tmp_path, per_holder=2)
    secrets = [register.issue("ada") for _ in range(2)]
    strict = DeviceRegistry(tmp_path, per_holder=1)
    strict.enroll(secrets[0], "key a", "a")
    with pytest.raises(AntherError, match="that is the most"):
        strict.enroll(secrets[1], "key b", "b")


def test_an_old_ticket_is_refused(tmp_path):
    register = DeviceRegistry(tmp_path)
    secret = register.issue("ada", days=1e-9)
    with pytest.raises(AntherError, match="expired"):
        register.enroll(secret, "key", "pi")


def test_names_and_keys_are_not_taken_twice(tmp_path):
    register = DeviceRegistry(tmp_path)
    register.enroll(register.issue("ada"), "key", "pi")
    with pytest.raises(AntherError, match="another device is called pi"):
        register.enroll(register.issue("ada"), "key b", "pi")
    with pytest.raises(AntherError, match="known here already"):
        register.enroll(register.issue("ada"), "key", "pi-2")


def test_a_name_stays_with_its_key(tmp_path):
    register = DeviceRegistry(tmp_path)
    secret = register.issue("ada")
    register.enroll(secret, "key", "pi")
    with pytest.raises(AntherError, match=r"this device is in as pi, .* go on with name=pi"):
        register.enroll(secret, "key", "pi-2")
    assert [member.name for member in register.look().active_devices().values()] == ["pi"]
    register.revoke("pi")


def test_an_open_ticket_can_be_voided_by_its_name(tmp_path, capsys):
    register = DeviceRegistry(tmp_path, per_holder=2)
    register.enroll(register.issue("ada"), "key", "pi")
    void, _ = register.issue("ada"), register.issue("ben")
    write(tmp_path / "federation.json", strict_json.dumps(Address(federation="f", host="h", port=1)).encode())
    assert keys.main(["list", "--folder", str(tmp_path)]) == 0
    device, *tickets = capsys.readouterr().out.splitlines()
    assert device.startswith("pi  of ada")
    name = next(line.split()[0] for line in tickets if "open, of ada" in line)
    assert void not in "".join(tickets)
    assert keys.main(["revoke", name, "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{name} lets nobody in any more.\n"
    with pytest.raises(AntherError, match="no such ticket"):
        register.enroll(void, "another key", "b")
    with pytest.raises(AntherError, match="no such device or open ticket"):
        register.revoke(name)
    register.issue("ada")  # its place is free again
    assert len(register.look().members) == 1


def test_a_ticket_that_is_voided_while_it_is_used(tmp_path, monkeypatch):
    register = DeviceRegistry(tmp_path)
    secret, before = register.issue("ada"), register.look()
    register.revoke(next(iter(map(ticket_name, before.tickets))))
    looks = [before]  # what whoever enrols saw just before
    look = DeviceRegistry.look
    monkeypatch.setattr(DeviceRegistry, "look", lambda self: looks.pop() if looks else look(self))
    with pytest.raises(AntherError, match="no such ticket"):
        register.enroll(secret, "key a", "pi")


def test_who_was_revoked_stays_out_and_its_name_is_free(tmp_path):
    register = DeviceRegistry(tmp_path)
    register.enroll(register.issue("ada"), "key", "pi")
    register.revoke("pi")
    assert register.look().find("key") is None
    assert register.look().active_devices() == {}
    with pytest.raises(AntherError, match="was revoked"):
        register.enroll(register.issue("ada"), "key", "pi")
    register.enroll(register.issue("ada"), "key b", "pi")
    with pytest.raises(AntherError, match="no such device"):
        register.revoke("nobody")


def test_another_process_sees_it_at_once(tmp_path):
    watching, writing = DeviceRegistry(tmp_path), DeviceRegistry(tmp_path)
    assert watching.look().members == {}
    writing.enroll(writing.issue("ada"), "key", "pi")
    assert watching.look().find("key")
    writing.revoke("pi")
    assert watching.look().find("key") is None


def test_no_secret_lies_on_the_disk(tmp_path):
    register = DeviceRegistry(tmp_path)
    secret = register.issue("ada")
    assert secret not in (tmp_path / FILE).read_text()
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0
    until = datetime.fromisoformat(next(iter(json.loads((tmp_path / FILE).read_text())["tickets"].values()))["expires"])
    assert timedelta(days=6.9) < until - datetime.now(UTC) < timedelta(days=7.1)


def test_a_damaged_register_is_named(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(AntherError, match="is damaged"):
        DeviceRegistry(tmp_path).look()
