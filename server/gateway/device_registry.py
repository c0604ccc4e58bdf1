"""Who may take part: tickets that work once, and the devices that came with them, so many for each holder.

One JSON file, replaced whole under a lock: `server.gateway.keys` writes it while the server runs, and the server looks again.
Of a ticket's secret only the SHA-256 is kept.
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
class Issued:
    """A ticket, by the hash of its secret."""

    holder: str
    expires: str  # ISO 8601, UTC
    used_by: str | None = None  # the public key that came with it


@dataclass(frozen=True, kw_only=True)
class EnrolledDevice:
    """One device: its public key in OpenSSH's form is its name in the register."""

    name: str
    holder: str
    since: str
    revoked: str | None = None  # since when, if it is


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All of the register."""

    tickets: dict[str, Issued] = field(default_factory=dict)
    members: dict[str, EnrolledDevice] = field(default_factory=dict)

    def of(self, holder: str) -> list[EnrolledDevice]:
        return [member for member in self.members.values() if member.holder == holder and not member.revoked]

    def active_devices(self) -> dict[str, EnrolledDevice]:
        """Who is in, by public key."""
        return {key: member for key, member in self.members.items() if not member.revoked}

    def find(self, key: str) -> EnrolledDevice | None:
        """The device with this public key, unless it is none, or was revoked."""
        member = self.members.get(key)
        return None if member is None or member.revoked else member


class DeviceRegistry:
    """The register in a folder.

    Args:
        per_holder: devices of one holder at most, open tickets counted.
    """

    def __init__(self, folder: Path, *, per_holder: int = 5) -> None:
        self._file, self._per_holder = folder / FILE, per_holder
        self._seen: tuple[tuple[int, int], Contents] | None = None

    def look(self) -> Contents:
        """What is in it now. AntherError if it is damaged."""
        try:
            status = self._file.stat()
        except FileNotFoundError:
            return Contents()
        mark = status.st_mtime_ns, status.st_ino
        if self._seen is None or self._seen[0] != mark:
            self._seen = mark, self._read()
        return self._seen[1]

    def issue(self, holder: str, *, days: float = 7.0) -> str:
        """The secret of a new ticket; AntherError if its holder has as many devices and tickets as are allowed."""
        secret, now = secrets.token_urlsafe(24), datetime.now(UTC)
        with self._locked() as contents:
            open_ = [t for t in contents.tickets.values() if t.holder == holder and _is_open(t, now)]
            there = len(contents.of(holder))
            if there + len(open_) >= self._per_holder:
                raise AntherError(
                    f"{holder} has {there} devices and {len(open_)} open tickets, and {self._per_holder} are the most: "
                    "revoke one, or start the server with a higher server.per_holder"
                )
            ticket = Issued(holder=holder, expires=(now + timedelta(days=days)).isoformat())
            self._write(replace(contents, tickets={**contents.tickets, _hash(secret): ticket}))
        return secret

    def enroll(self, secret: str, key: str, name: str) -> EnrolledDevice:
        """Let a device in; asked again by the same one, as after a reply that was lost, it is in already.

        Raises:
            AntherError: the ticket is unknown, used or expired, or the name or the key is taken.
        """
        now, mark = datetime.now(UTC), _hash(secret)
        unknown = AntherError("no such ticket: ask the operator for another one")
        if mark not in self.look().tickets:  # guesses don't wait for the lock, nor hold it
            raise unknown
        with self._locked() as contents:
            if (ticket := contents.tickets.get(mark)) is None:  # voided meanwhile
                raise unknown
            if ticket.used_by == key and (member := contents.find(key)):
                if member.name != name:
                    raise AntherError(
                        f"this device is in as {member.name}, and a name stays with its key, as does what it may still "
                        f"spend: go on with name={member.name}, or have it revoked and enroll with a new key"
                    )
                return member
            if ticket.used_by is not None:
                raise AntherError("this ticket was used already, and works once: ask the operator for another one")
            if not _is_open(ticket, now):
                raise AntherError(f"this ticket expired on {ticket.expires[:10]}: ask the operator for another one")
            if len(contents.of(ticket.holder)) >= self._per_holder:
                raise AntherError(f"{ticket.holder} has {self._per_holder} devices already, and that is the most")
            if key in contents.members:
                raise AntherError("this device's key is known here already, or was revoked: enrol with a new one")
            if any(member.name == name for member in contents.members.values() if not member.revoked):
                raise AntherError(f"another device is called {name}: choose another with name=…")
            member = EnrolledDevice(name=name, holder=ticket.holder, since=now.isoformat(timespec="seconds"))
            self._write(
                Contents(
                    tickets={**contents.tickets, mark: replace(ticket, used_by=key)},
                    members={**contents.members, key: member},
                )
            )
        return member

    def revoke(self, name: str) -> None:
        """Shut a device out, or void an open ticket, from now on; AntherError if nothing has this name."""
        with self._locked() as contents:
            keys = [key for key, member in contents.members.items() if member.name == name and not member.revoked]
            if not keys:
                now = datetime.now(UTC)
                void = [key for key, one in contents.tickets.items() if ticket_name(key) == name and _is_open(one, now)]
                if not void:
                    raise AntherError(f"{name}: no such device or open ticket; anther keys list shows all")
                left = {key: one for key, one in contents.tickets.items() if key not in void}
                self._write(replace(contents, tickets=left))
                return
            gone = replace(contents.members[keys[0]], revoked=datetime.now(UTC).isoformat(timespec="seconds"))
            self._write(replace(contents, members={**contents.members, keys[0]: gone}))

    def _read(self) -> Contents:
        try:
            return strict_json.from_plain(Contents, strict_json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise AntherError(f"{self._file} is damaged ({error}): restore it from a backup") from error

    def _write(self, contents: Contents) -> None:
        write(self._file, strict_json.dumps(contents).encode())

    @contextmanager
    def _locked(self) -> Iterator[Contents]:
        make_folder(self._file.parent)
        handle = os.open(self._file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield self.look()
        finally:
            os.close(handle)


def ticket_name(hashed: str) -> str:
    """What a ticket is called in lists, which tells nothing of its secret."""
    return f"ticket-{hashed[:8]}"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _is_open(ticket: Issued, now: datetime) -> bool:
    return ticket.used_by is None and datetime.fromisoformat(ticket.expires) > now
