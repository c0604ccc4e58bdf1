"""Answers of the gateway that end a request."""

from __future__ import annotations

# How Flower's SuperNode takes a status decides which one is right: after 401 it ends, and is started and activated
# anew; after 403 it forgets the message at hand and goes on; after 503 it tries the same again, and so it does when a
# connection breaks.
UNKNOWN, NOT_YOURS, MALFORMED, TOO_LARGE, LATER = 401, 403, 400, 413, 503


class Refusal(Exception):  # noqa: N818 - nothing is wrong with the server
    """A request that isn't carried out.

    Args:
        status: of HTTP.
        reason: one line, for the device's log and ours.
        hostile: whether no SuperNode of ours ever sends such a request.
    """

    def __init__(self, status: int, reason: str, *, hostile: bool = False) -> None:
        super().__init__(reason)
        self.status, self.reason, self.hostile = status, reason, hostile


def hostile(reason: str, status: int = NOT_YOURS) -> Refusal:
    """The refusal of a request that no SuperNode of ours sends."""
    return Refusal(status, reason, hostile=True)
