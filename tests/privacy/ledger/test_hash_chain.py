"""Hash chain: every change is detected, unless the chain is recomputed."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AntherError
from privacy.ledger import hash_chain


def make_lines(count: int) -> list[bytes]:
    lines: list[bytes] = []
    for number in range(count):
        lines.append(hash_chain.encode_event({"number": number}, hash_chain.chain_head(lines)))
    return lines


@given(st.integers(0, 6))
def test_events_roundtrip(count: int) -> None:
    assert hash_chain.parse_events(make_lines(count), "x") == [{"number": number} for number in range(count)]


@given(st.integers(2, 6), st.data())
def test_changed_lines_are_detected(count: int, data: st.DataObject) -> None:
    lines = make_lines(count)
    index = data.draw(st.integers(0, count - 2))  # a changed last line is detected by the head only
    edited = lines[index].replace(b'"number":', b'"number":9')
    spoilt = data.draw(
        st.sampled_from(
            [
                [*lines[:index], edited, *lines[index + 1 :]],
                [*lines[:index], *lines[index + 1 :]],
                [*lines[:index], lines[index + 1], lines[index], *lines[index + 2 :]],
                [*lines[: index + 1], *lines[index:]],
                [*lines[:index], b"{", *lines[index + 1 :]],
            ]
        )
    )
    with pytest.raises(AntherError, match=r"^x:\d+: "):
        hash_chain.parse_events(spoilt, "x")


@given(st.integers(0, 6), st.integers(0, 7))
def test_starts_with_checks_the_head(count: int, known: int) -> None:
    lines = make_lines(count)
    before = make_lines(known)
    digest = hashlib.sha256(before[-1]).hexdigest() if before else hash_chain.START
    assert hash_chain.starts_with(lines, known, digest) == (known <= count)
    assert not hash_chain.starts_with(lines, known, hashlib.sha256(b"another").hexdigest())
