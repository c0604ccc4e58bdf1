"""Anchors of a ledger, to detect that it was lost, truncated, edited or copied from another device.

A ledger consists of its journal, whose first line has a random id, and two anchors:

- the *head*, outside of the ledger's folder: the id, the number of lines and the digest of the last line;
- the *marker*, inside of the folder: the id, and the location of the head.

Each event is made durable in the journal first, then in the head; at an enrollment the marker is written last. After a
crash at any point, the journal therefore begins with the lines that the head names, followed by one more line, or by
several if events were added meanwhile. The head is then repaired silently. A head that names missing or different lines
is not the result of a crash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import AntherError
from privacy.ledger import hash_chain

RECOVERY_HINT = (
    "restore the missing part from a backup, or discard the ledger's record: anther device ledger reset --forget"
)


@dataclass(frozen=True, slots=True)
class JournalHead:
    """Head of a journal, stored outside of its folder."""

    ledger: str
    events: int
    sha256: str
    """Digest of line number `events`."""

    def to_json(self) -> bytes:
        return json.dumps({"ledger": self.ledger, "events": self.events, "sha256": self.sha256}).encode()


@dataclass(frozen=True, slots=True)
class Marker:
    """Marker of an enrolled device."""

    ledger: str
    head: str
    """Location of the journal's head."""

    def to_json(self) -> bytes:
        return json.dumps({"ledger": self.ledger, "head": self.head}).encode()


def parse_head(data: bytes, where: str) -> JournalHead:
    """Parse the result of `JournalHead.to_json`; AntherError for anything else."""
    try:
        fields = json.loads(data)
        head = JournalHead(str(fields["ledger"]), int(fields["events"]), str(fields["sha256"]))
        if head.events < 1:
            raise ValueError("no events")
        return head
    except (ValueError, KeyError, TypeError) as error:
        raise AntherError(f"{where}: not the head of a ledger: {RECOVERY_HINT}") from error


def parse_marker(data: bytes, where: str) -> Marker:
    """Parse the result of `Marker.to_json`; AntherError for anything else."""
    try:
        fields = json.loads(data)
        return Marker(str(fields["ledger"]), str(fields["head"]))
    except (ValueError, KeyError, TypeError) as error:
        raise AntherError(f"{where}: not the marker of a ledger: {RECOVERY_HINT}") from error


def check(
    ledger: str | None, lines: Sequence[bytes], head: JournalHead | None, marker: Marker | None, where: str
) -> None:
    """Check that journal, head and marker belong to one ledger, and that the journal has all lines that the head names.

    A missing marker is accepted if journal and head agree.

    Args:
        ledger: id in the journal's first line; None without lines.
        lines: lines of the journal.
        head: its head; None if it is missing.
        marker: its marker; None if it is missing.
        where: location of the journal, for messages.

    Raises:
        AntherError: they disagree; the message says how, and how to recover.
    """
    if not lines:
        if anchor := head or marker:
            count = f" of {head.events} events" if head else ""
            raise AntherError(f"{where}: the ledger {anchor.ledger[:8]}{count} is missing: {RECOVERY_HINT}")
        return
    for anchor, name in ((head, "head"), (marker, "marker")):
        if anchor and anchor.ledger != ledger:
            raise AntherError(
                f"{where}: is the ledger {str(ledger)[:8]}, and this device's {name} is of {anchor.ledger[:8]}: "
                f"it was brought from elsewhere: {RECOVERY_HINT}"
            )
    if head is None:
        if len(lines) > 1 or marker:
            raise AntherError(
                f"{where}: its head is missing, so the ledger may be incomplete or a copy: {RECOVERY_HINT}"
            )
    elif head.events > len(lines):
        raise AntherError(
            f"{where}: was cut short or rolled back: it holds {len(lines)} events of {head.events}: {RECOVERY_HINT}"
        )
    elif not hash_chain.starts_with(lines, head.events, head.sha256):
        raise AntherError(f"{where}:{head.events}: not the line that was written there: {RECOVERY_HINT}")
