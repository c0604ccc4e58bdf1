"""A chain of lines: whatever is done to it by somebody who doesn't write it anew is found."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AntherError
from privacy.ledger import hash_chain


def made(count: int) -> list[bytes]:
    lines: list[bytes] = []
    for number in range(count):
        lines.append(hash_chain.encode_event({"number": number}, hash_chain.chain_head(lines)))
    return lines


@given(st.integers(0, 6))
def test_events_come_back(count: int) -> None:
    assert hash_chain.parse_events(made(count), "x") == [{"number": number} for number in range(count)]


@given(st.integers(2, 6), st.data())
def test_lines_changed_moved_or_taken_out_are_found(count: int, data: st.DataObject) -> None:
    lines = made(count)
    place = data.draw(st.integers(0, count - 2))  # of the last line only a head elsewhere knows
    edited = lines[place].replace(b'"number":', b'"number":9')
    spoilt = data.draw(
        st.sampled_from(
            [
                [*lines[:place], edited, *lines[place + 1 :]],
                [*lines[:place], *lines[place + 1 :]],
                [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]],
                [*lines[: place + 1], *lines[place:]],
                [*lines[:place], b"{", *lines[place + 1 :]],
            ]
        )
    )
    with pytest.raises(AntherError, match=r"^x:\d+: "):
        hash_chain.parse_events(spoilt, "x")


@given(st.integers(0, 6), st.integers(0, 7))
def test_it_begins_with_what_its_head_stood_for_and_with_nothing_else(count: int, known: int) -> None:
    lines = made(count)
    before = made(known)
    digest = hashlib.sha256(before[-1]).hexdigest() if before else hash_chain.START
    assert hash_chain.starts_with(lines, known, digest) == (known <= count)
    assert not hash_chain.starts_with(lines, known, hashlib.sha256(b"another").hexdigest())
