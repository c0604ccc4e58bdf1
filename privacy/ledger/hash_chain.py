"""Hash chain: each line of a journal contains the hash of the line before it, so that changes are detected.

Each line is a JSON object with `previous`, the SHA-256 of the line before. This detects accidents and careless edits.
Anyone who can write the file can also write another chain, so heads are also stored elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import AntherError

START = "0" * 64

_encoder = json.JSONEncoder(separators=(",", ":"))


def chain_head(lines: Sequence[bytes]) -> str:
    """Return the `previous` of the next line, which identifies all of these lines in their order."""
    return hashlib.sha256(lines[-1]).hexdigest() if lines else START


def starts_with(lines: Sequence[bytes], count: int, digest: str) -> bool:
    """Whether the first lines of a chain have a given head.

    Args:
        lines: lines of the journal.
        count: number of lines to check, from the first.
        digest: chain head of these lines.
    """
    return count <= len(lines) and chain_head(lines[:count]) == digest


def encode_event(event: Mapping[str, Any], previous: str) -> bytes:
    """Encode an event as a line that links to the chain head `previous`."""
    return _encoder.encode({**event, "previous": previous}).encode()


def parse_events(lines: Sequence[bytes], where: str) -> list[dict[str, Any]]:
    """Parse the events of lines and verify their links.

    Raises:
        AntherError: a line is not an event, or its link is wrong; names `where` and the line.
    """
    parsed = []
    previous = START
    for number, text in enumerate(lines, start=1):
        try:
            event = json.loads(text)
            link = event.pop("previous")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise AntherError(f"{where}:{number}: not an event; restore the file from a backup") from None
        if link != previous:
            raise AntherError(
                f"{where}:{number}: doesn't follow the line before it: lines were changed, moved or removed; restore "
                "the file from a backup"
            )
        parsed.append(event)
        previous = hashlib.sha256(text).hexdigest()
    return parsed
