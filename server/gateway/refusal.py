"""Refusals of requests, with HTTP statuses that Flower's SuperNode handles correctly."""

from __future__ import annotations

# The right status follows from the reaction of Flower's SuperNode: after 401 it exits, and is started and activated
# again; after 403 it drops the current message and continues; after 503, or if a connection breaks, it retries.
UNKNOWN, NOT_YOURS, MALFORMED, TOO_LARGE, LATER = 401, 403, 400, 413, 503


class RequestRefused(Exception):  # noqa: N818 - nothing is wrong with the server
    """Refusal of a request.

    Args:
        status: HTTP status.
        reason: one line, for the logs of the device and the server.
        hostile: whether Anther's SuperNode never sends such a request.
    """

    def __init__(self, status: int, reason: str, *, hostile: bool = False) -> None:
        super().__init__(reason)
        self.status, self.reason, self.hostile = status, reason, hostile


def hostile(reason: str, status: int = NOT_YOURS) -> RequestRefused:
    """Return the refusal of a request that Anther's SuperNode never sends."""
    return RequestRefused(status, reason, hostile=True)
