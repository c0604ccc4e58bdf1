"""A journal whose every line names the one before it, so that one that was changed, moved or taken out is found.

Each line is a JSON object with `previous`, the SHA-256 of the line before. It shows accidents and careless edits;
whoever can write the file can also write another chain, which is why heads are kept elsewhere too.
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
    """What the next line will name: it stands for all of these, in their order."""
    return hashlib.sha256(lines[-1]).hexdigest() if lines else START


def starts_with(lines: Sequence[bytes], count: int, digest: str) -> bool:
    """Whether the first `count` of these lines are those that this head stood for."""
    return count <= len(lines) and chain_head(lines[:count]) == digest


def encode_event(event: Mapping[str, Any], previous: str) -> bytes:
    """An event as the line that follows the one of this head."""
    return _encoder.encode({**event, "previous": previous}).encode()


def parse_events(lines: Sequence[bytes], where: str) -> list[dict[str, Any]]:
    """The events of lines whose links hold.

    Raises:
        AntherError: a line is no event, or doesn't follow the one before it; names `where` and the line.
    """
    found = []
    previous = START
    for number, text in enumerate(lines, start=1):
        try:
            event = json.loads(text)
            link = event.pop("previous")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise AntherError(f"{where}:{number}: not an event; restore the file from a backup") from None
        if link != previous:
            raise AntherError(
                f"{where}:{number}: doesn't follow the line before it: lines were changed, moved or taken out; restore "
                "the file from a backup"
            )
        found.append(event)
        previous = hashlib.sha256(text).hexdigest()
    return found
