"""What is said before anything else, over HTTPS: can this device and this server work together, and on which base."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import AntherError
from protocol import messages


@dataclass(frozen=True, kw_only=True)
class Hello:
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
        """AntherError, with what to do, if this device and the server don't speak alike."""
        if self.oldest > messages.NEWEST:
            raise AntherError(
                f"this server (Anther {self.anther}) speaks protocol {self.oldest} and later, this device "
                f"{messages.NEWEST}: update Anther here (pip install --upgrade anther), then start again"
            )
        if self.newest < messages.OLDEST:
            raise AntherError(
                f"this server (Anther {self.anther}) speaks protocol {self.newest} at most, this device "
                f"{messages.OLDEST} and later: ask its operator to update it"
            )


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """What a device says to come in."""

    protocol: int
    """The newest version that it speaks."""
    secret: str
    """Of its ticket."""
    key: str
    """Its public key, as OpenSSH writes it."""
    name: str
