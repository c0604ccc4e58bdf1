"""What is said before anything else, over HTTPS: can this device and this server work together, and on which base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from common.errors import AntherError, shown
from protocol import messages

LARGEST_BASE = 1 << 43
"""Bytes of a base: 8 TiB."""
_FEDERATION = re.compile(r"(?!null$)[a-z0-9][a-z0-9._-]{0,79}")


@dataclass(frozen=True, kw_only=True)
class ServerHello:
    """What a server says of itself."""

    oldest: int
    """Version of the protocol that it still speaks."""
    newest: int
    anther: str
    """Its release, for people to read."""
    federation: str
    """Its name: what a device keeps apart from other federations."""
    base: str
    """Content hash of the base that devices hold."""
    base_bytes: int
    """What a device without it downloads."""
    time: str
    """Of the server's clock, ISO 8601."""

    def check(self) -> None:
        """AntherError, with what to do, if this device and the server don't speak alike, or a value can't be meant.

        Whoever says it may be anybody: nothing of it is used before.
        """
        theirs = shown(self.anther, 40)
        if self.oldest > messages.NEWEST:
            raise AntherError(
                f"this server (Anther {theirs}) speaks protocol {self.oldest} and later, this device "
                f"{messages.NEWEST}: update Anther here (pip install --upgrade anther), then start again"
            )
        if self.newest < messages.OLDEST:
            raise AntherError(
                f"this server (Anther {theirs}) speaks protocol {self.newest} at most, this device "
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
                said = shown(repr(getattr(self, name)), 60)
                raise AntherError(f"the server's greeting says {name}={said}, which must be {rule}: ask its operator")

    def clock(self) -> datetime | None:
        """What the server's clock showed; None if it doesn't say so, with its zone."""
        try:
            found = datetime.fromisoformat(self.time) if len(self.time) <= 40 else None
        except ValueError:
            return None
        return found if found is not None and found.utcoffset() is not None else None


@dataclass(frozen=True, kw_only=True)
class Enrollment:
    """What a device says to come in."""

    protocol: int
    """The newest version that it speaks."""
    secret: str
    """Of its ticket."""
    key: str
    """Its public key, as OpenSSH writes it."""
    name: str
