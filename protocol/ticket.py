"""Enrollment ticket from the operator to a participant: address and identity of the server, and a one-time secret.

    anther://host:port/SECRET/FINGERPRINT

The fingerprint is that of the federation's own certificate authority (SHA-256, hex): a device with the ticket trusts no
other authority at that address.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from common.errors import AntherError

_WRITTEN = re.compile(r"anther://(?P<address>[^/\s]+:\d{1,5})/(?P<secret>[\w-]{20,64})/(?P<fingerprint>[0-9a-f]{64})")


class Ticket(NamedTuple):
    """The fields of a ticket."""

    address: str
    """host:port."""
    secret: str
    fingerprint: str

    def __str__(self) -> str:
        return f"anther://{self.address}/{self.secret}/{self.fingerprint}"


def parse(text: str) -> Ticket:
    """Parse a ticket; AntherError if it is incomplete or not a ticket."""
    match = _WRITTEN.fullmatch(text.strip())
    if match is None:
        raise AntherError("incomplete ticket: copy all of anther://host:port/…/…, as `anther keys ticket` prints it")
    return Ticket(**match.groupdict())
