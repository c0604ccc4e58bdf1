"""How a fresh ledger is told from one that was lost, cut short, edited or brought from elsewhere.

Beside the journal, whose first line holds an id drawn at random, there are

- a *head* outside of the ledger's folder: the id, the number of lines and the digest of the last one;
- a *marker* inside of it: the id, and where the head lies.

Each event is made durable in the journal first, then in the head; an enrolment last in the marker. So whatever a
crash comes between, the journal is an extension of what the head names, by one line if all went on by itself: the
head is then mended silently. A head that names lines which aren't there, or other ones, is no crash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import AntherError
from privacy.ledger import hash_chain

RECOVERY_HINT = (
    "restore what is missing from a backup, or give up what the ledger counted: anther device ledger reset --forget"
)


@dataclass(frozen=True, slots=True)
class JournalHead:
    """What is known of a journal elsewhere."""

    ledger: str
    events: int
    sha256: str
    """Of line number `events`."""

    def to_json(self) -> bytes:
        return json.dumps({"ledger": self.ledger, "events": self.events, "sha256": self.sha256}).encode()


@dataclass(frozen=True, slots=True)
class Marker:
    """That a device was enrolled."""

    ledger: str
    head: str
    """Where the head of its journal lies."""

    def to_json(self) -> bytes:
        return json.dumps({"ledger": self.ledger, "head": self.head}).encode()


def parse_head(data: bytes, where: str) -> JournalHead:
    """Raises AntherError for what `JournalHead.to_json` hasn't written."""
    try:
        found = json.loads(data)
        head = JournalHead(str(found["ledger"]), int(found["events"]), str(found["sha256"]))
        if head.events < 1:
            raise ValueError("no events")
        return head
    except (ValueError, KeyError, TypeError) as error:
        raise AntherError(f"{where}: not the head of a ledger: {RECOVERY_HINT}") from error


def parse_marker(data: bytes, where: str) -> Marker:
    """Raises AntherError for what `Marker.to_json` hasn't written."""
    try:
        found = json.loads(data)
        return Marker(str(found["ledger"]), str(found["head"]))
    except (ValueError, KeyError, TypeError) as error:
        raise AntherError(f"{where}: not the marker of a ledger: {RECOVERY_HINT}") from error


def check(
    ledger: str | None, lines: Sequence[bytes], head: JournalHead | None, marker: Marker | None, where: str
) -> None:
    """That journal, head and marker are of one ledger, and the journal is all that the head has ever known.

    A marker that alone is missing is no harm: the other two agree.

    Args:
        ledger: the id in the journal's first line; None without lines.

    Raises:
        AntherError: they aren't: says what was found, and how to recover.
    """
    if not lines:
        if known := head or marker:
            count = f" of {head.events} events" if head else ""
            raise AntherError(f"{where}: the ledger {known.ledger[:8]}{count} is missing: {RECOVERY_HINT}")
        return
    for kept, what in ((head, "head"), (marker, "marker")):
        if kept and kept.ledger != ledger:
            raise AntherError(
                f"{where}: is the ledger {str(ledger)[:8]}, and this device's {what} is of {kept.ledger[:8]}: "
                f"it was brought from elsewhere: {RECOVERY_HINT}"
            )
    if head is None:
        if len(lines) > 1 or marker:
            raise AntherError(
                f"{where}: its head is missing: whether this is all of the ledger or a copy of it, nobody knows: "
                f"{RECOVERY_HINT}"
            )
    elif head.events > len(lines):
        raise AntherError(
            f"{where}: was cut short or rolled back: it holds {len(lines)} events of {head.events}: {RECOVERY_HINT}"
        )
    elif not hash_chain.starts_with(lines, head.events, head.sha256):
        raise AntherError(f"{where}:{head.events}: not the line that was written there: {RECOVERY_HINT}")
