"""Enrollment tickets and the handshake: round trip, incomplete tickets, version mismatch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AntherError
from protocol.handshake import ServerHello
from protocol.messages import NEWEST, OLDEST
from protocol.ticket import Ticket, parse

WHOLE = Ticket("pi.local:9443", "s" * 32, "0f" * 32)


@given(
    st.from_regex(r"[a-z0-9.-]{1,40}:[1-9][0-9]{0,4}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9_-]{20,64}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)
def test_ticket_roundtrip(address, secret, fingerprint):
    ticket = Ticket(address, secret, fingerprint)
    assert parse(f"  {ticket}\n") == ticket


@pytest.mark.parametrize("cut", [1, 5, 40, 64, 70, 110])
def test_incomplete_ticket_is_rejected(cut):
    with pytest.raises(AntherError, match="incomplete ticket"):
        parse(str(WHOLE)[:-cut])


def server_hello(oldest: int, newest: int) -> ServerHello:
    return ServerHello(
        oldest=oldest,
        newest=newest,
        anther="9.9",
        federation="f" * 16,
        base="b" * 64,
        base_bytes=1,
        time="2030-01-01T00:00:00+00:00",
    )


def test_older_side_is_asked_to_update():
    server_hello(OLDEST, NEWEST).check()
    with pytest.raises(AntherError, match="update Anther here"):
        server_hello(NEWEST + 1, NEWEST + 2).check()
    with pytest.raises(AntherError, match="ask its operator to update"):
        server_hello(OLDEST - 2, OLDEST - 1).check()
