"""What an operator hands to whoever is to take part: where the server is, who it is, and a secret that works once.

    anther://host:port/SECRET/FINGERPRINT

The fingerprint is that of the federation's own authority (SHA-256, hex): a device that has the ticket trusts nobody
else, whoever answers at that address.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from common.errors import AntherError

_WRITTEN = re.compile(r"anther://(?P<address>[^/\s]+:\d{1,5})/(?P<secret>[\w-]{20,64})/(?P<fingerprint>[0-9a-f]{64})")


class Ticket(NamedTuple):
    """What it says."""

    address: str
    """host:port."""
    secret: str
    fingerprint: str

    def __str__(self) -> str:
        return f"anther://{self.address}/{self.secret}/{self.fingerprint}"


def read(text: str) -> Ticket:
    """The ticket that somebody was given; AntherError if it is none, or not whole."""
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        raise AntherError("not a whole ticket: it looks like anther://host:port/…/…, as `anther keys ticket` prints it")
    return Ticket(**found.groupdict())
