"""Handshake over HTTPS before any other message. It compares protocol versions and names the federation's base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from common.errors import AntherError, shorten
from protocol import messages

LARGEST_BASE = 1 << 43
"""Maximum size of a base in bytes: 8 TiB."""
_FEDERATION = re.compile(r"(?!null$)[a-z0-9][a-z0-9._-]{0,79}")


@dataclass(frozen=True, kw_only=True)
class ServerHello:
    """A server's self-description."""

    oldest: int
    """Oldest protocol version that it supports."""
    newest: int
    anther: str
    """Its release of Anther, for display."""
    federation: str
    """Its name, by which a device separates federations."""
    base: str
    """Content hash of the federation's base."""
    base_bytes: int
    """Download size of the base."""
    time: str
    """The server's clock, ISO 8601."""

    def check(self) -> None:
        """Raise AntherError, with a remedy, if the protocol versions don't match or a value is invalid.

        The sender is not authenticated yet: nothing of the message is used before this check.
        """
        server_release = shorten(self.anther, 40)
        if self.oldest > messages.NEWEST:
            raise AntherError(
                f"this server (Anther {server_release}) supports protocol {self.oldest} and later, this device "
                f"{messages.NEWEST}: update Anther here (pip install --upgrade anther), then start again"
            )
        if self.newest < messages.OLDEST:
            raise AntherError(
                f"this server (Anther {server_release}) supports protocols up to {self.newest}, this device "
                f"{messages.OLDEST} and later: ask its operator to update it"
            )
        for name, valid, rule in (
            ("anther", len(self.anther) <= 40 and self.anther.isprintable(), "at most 40 printable characters"),
            ("federation", _FEDERATION.fullmatch(self.federation), "up to 80 of a-z, 0-9, '.', '_' and '-'"),
            ("base", re.fullmatch("[0-9a-f]{64}", self.base), "a content hash of 64 hex digits"),
            ("base_bytes", 0 <= self.base_bytes <= LARGEST_BASE, f"0 to {LARGEST_BASE}"),
            ("time", self.clock() is not None, "a date and time with its zone"),
        ):
            if not valid:
                shown_value = shorten(repr(getattr(self, name)), 60)
                raise AntherError(f"the server sent {name}={shown_value}, which must be {rule}: ask its operator")

    def clock(self) -> datetime | None:
        """Return the server's time, or None if it is invalid or has no time zone."""
        try:
            parsed = datetime.fromisoformat(self.time) if len(self.time) <= 40 else None
        except ValueError:
            return None
        return parsed if parsed is not None and parsed.utcoffset() is not None else None


@dataclass(frozen=True, kw_only=True)
class Enrollment:
    """A device's request to join."""

    protocol: int
    """Newest protocol version that it supports."""
    secret: str
    """Secret of its ticket."""
    key: str
    """Its public key in OpenSSH format."""
    name: str
