"""Registry of enrolled devices and of tickets, which work once; the number of devices per holder is limited.

It is one JSON file, replaced atomically under a lock. `anther keys` writes it while the server runs, and the server
reads it again. Only the SHA-256 of a ticket's secret is stored.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common import strict_json
from common.atomic_files import make_folder, write
from common.errors import AntherError

FILE = "register.json"


@dataclass(frozen=True, kw_only=True)
class IssuedTicket:
    """A ticket, stored under the hash of its secret."""

    holder: str
    expires: str  # ISO 8601, UTC
    used_by: str | None = None  # public key that was enrolled with it


@dataclass(frozen=True, kw_only=True)
class EnrolledDevice:
    """One device, stored under its public key in OpenSSH's form."""

    name: str
    holder: str
    since: str  # ISO 8601, UTC
    revoked: str | None = None  # time of revocation


@dataclass(frozen=True, kw_only=True)
class RegistryContents:
    """Contents of the registry; field names are the stored format."""

    tickets: dict[str, IssuedTicket] = field(default_factory=dict)
    members: dict[str, EnrolledDevice] = field(default_factory=dict)

    def devices_of(self, holder: str) -> list[EnrolledDevice]:
        """Return a holder's devices that are not revoked."""
        return [member for member in self.members.values() if member.holder == holder and not member.revoked]

    def active_devices(self) -> dict[str, EnrolledDevice]:
        """Return the devices that are not revoked, by public key."""
        return {key: member for key, member in self.members.items() if not member.revoked}

    def find(self, key: str) -> EnrolledDevice | None:
        """Return the device with this public key; None if it is unknown or revoked."""
        member = self.members.get(key)
        return None if member is None or member.revoked else member


class DeviceRegistry:
    """The registry in a folder.

    Args:
        per_holder: maximum number of devices per holder, open tickets included.
    """

    def __init__(self, folder: Path, *, per_holder: int = 5) -> None:
        self._file, self._per_holder = folder / FILE, per_holder
        self._cached: tuple[tuple[int, int], RegistryContents] | None = None

    def snapshot(self) -> RegistryContents:
        """Return the current contents.

        Raises:
            AntherError: the file is damaged.
        """
        try:
            status = self._file.stat()
        except FileNotFoundError:
            return RegistryContents()
        version = status.st_mtime_ns, status.st_ino
        if self._cached is None or self._cached[0] != version:
            self._cached = version, self._read()
        return self._cached[1]

    def issue(self, holder: str, *, days: float = 7.0) -> str:
        """Create a ticket, and return its secret.

        Raises:
            AntherError: the holder already has the maximum number of devices and tickets.
        """
        secret, now = secrets.token_urlsafe(24), datetime.now(UTC)
        with self._locked() as contents:
            open_ = [
                ticket for ticket in contents.tickets.values() if ticket.holder == holder and _is_open(ticket, now)
            ]
            devices = len(contents.devices_of(holder))
            if devices + len(open_) >= self._per_holder:
                raise AntherError(
                    f"{holder} has {devices} devices and {len(open_)} open tickets; the maximum is {self._per_holder}: "
                    "revoke one, or start the server with a higher server.max_devices_per_holder"
                )
            ticket = IssuedTicket(holder=holder, expires=(now + timedelta(days=days)).isoformat())
            self._write(replace(contents, tickets={**contents.tickets, _hash(secret): ticket}))
        return secret

    def enroll(self, secret: str, key: str, name: str) -> EnrolledDevice:
        """Enroll a device.

        If the same device asks again, for example because the first reply was lost, its existing entry is returned.

        Args:
            secret: secret of the ticket.
            key: public key of the device, in OpenSSH's form.
            name: name of the device.

        Raises:
            AntherError: the ticket is unknown, used or expired, or the name or the key is taken.
        """
        now, hashed = datetime.now(UTC), _hash(secret)
        unknown = AntherError("no such ticket: ask the operator for another one")
        if hashed not in self.snapshot().tickets:  # guesses never take the lock
            raise unknown
        with self._locked() as contents:
            if (ticket := contents.tickets.get(hashed)) is None:  # voided in the meantime
                raise unknown
            if ticket.used_by == key and (member := contents.find(key)):
                if member.name != name:
                    raise AntherError(
                        f"this device is enrolled as {member.name}; its name and its privacy budget stay with its key: "
                        f"use name={member.name}, or have it revoked and enroll with a new key"
                    )
                return member
            if ticket.used_by is not None:
                raise AntherError("this ticket was already used, and works only once: ask the operator for another one")
            if not _is_open(ticket, now):
                raise AntherError(f"this ticket expired on {ticket.expires[:10]}: ask the operator for another one")
            if len(contents.devices_of(ticket.holder)) >= self._per_holder:
                raise AntherError(
                    f"{ticket.holder} has {self._per_holder} devices already, which is the maximum: "
                    "ask the operator to revoke one"
                )
            if key in contents.members:
                raise AntherError("this device's key is already enrolled, or was revoked: enroll with a new one")
            if any(member.name == name for member in contents.members.values() if not member.revoked):
                raise AntherError(f"another device is called {name}: choose another with name=…")
            member = EnrolledDevice(name=name, holder=ticket.holder, since=now.isoformat(timespec="seconds"))
            self._write(
                RegistryContents(
                    tickets={**contents.tickets, hashed: replace(ticket, used_by=key)},
                    members={**contents.members, key: member},
                )
            )
        return member

    def revoke(self, name: str) -> None:
        """Revoke a device, or void an open ticket, from now on.

        Raises:
            AntherError: there is no device or open ticket with this name.
        """
        with self._locked() as contents:
            keys = [key for key, member in contents.members.items() if member.name == name and not member.revoked]
            if not keys:
                now = datetime.now(UTC)
                void = [
                    key
                    for key, ticket in contents.tickets.items()
                    if ticket_name(key) == name and _is_open(ticket, now)
                ]
                if not void:
                    raise AntherError(f"{name}: no such device or open ticket; anther keys list shows all")
                remaining = {key: ticket for key, ticket in contents.tickets.items() if key not in void}
                self._write(replace(contents, tickets=remaining))
                return
            revoked = replace(contents.members[keys[0]], revoked=datetime.now(UTC).isoformat(timespec="seconds"))
            self._write(replace(contents, members={**contents.members, keys[0]: revoked}))

    def _read(self) -> RegistryContents:
        try:
            return strict_json.from_plain(RegistryContents, strict_json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise AntherError(f"{self._file} is damaged ({error}): restore it from a backup") from error

    def _write(self, contents: RegistryContents) -> None:
        write(self._file, strict_json.dumps(contents).encode())

    @contextmanager
    def _locked(self) -> Iterator[RegistryContents]:
        make_folder(self._file.parent)
        handle = os.open(self._file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield self.snapshot()
        finally:
            os.close(handle)


def ticket_name(hashed: str) -> str:
    """Return a ticket's name for lists, which reveals nothing about its secret."""
    return f"ticket-{hashed[:8]}"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _is_open(ticket: IssuedTicket, now: datetime) -> bool:
    return ticket.used_by is None and datetime.fromisoformat(ticket.expires) > now
