"""The queue against a list: every entry once, in order, in whole units, whatever the sizes of the packs."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.batches import StepBatch
from training.microbatching import EntryQueue, Microbatch


class Step(NamedTuple):
    """One client's step."""

    row: int
    units: int
    per_unit: int


class Entry(NamedTuple):
    """One entry and where it belongs."""

    row: int
    unit: int  # of its client's step
    per_unit: int
    example: int


STEPS = st.lists(
    st.builds(Step, row=st.integers(0, 9), units=st.integers(0, 4), per_unit=st.integers(1, 6)),
    max_size=6,
    unique_by=lambda step: step.row,  # a client has one step at a time
)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def waiting(steps: list[Step]) -> list[Entry]:
    """All entries in the order in which they wait; every example is its own."""
    places = [(step, place) for step in steps for place in range(step.units * step.per_unit)]
    return [Entry(s.row, place // s.per_unit, s.per_unit, example) for example, (s, place) in enumerate(places)]


def push(queue: EntryQueue, steps: list[Step], known: list[Entry]) -> None:
    for step in steps:
        examples = np.array([entry.example for entry in known if entry.row == step.row], np.int64)
        queue.push(step.row, StepBatch(examples, examples / 1000, -examples, examples / 7, step.per_unit))


def queue_of(steps: list[Step]) -> EntryQueue:
    queue = EntryQueue()
    push(queue, steps, waiting(steps))
    return queue


def entries_of(pack: Microbatch, known: list[Entry]) -> list[Entry]:
    """The pack's entries, each with all that belongs to it."""
    assert (pack.phases == pack.examples / 1000).all()
    assert (pack.noise_keys == -pack.examples).all()
    assert (pack.weights == pack.examples / 7).all()
    found = [known[example] for example in pack.examples.tolist()]
    assert pack.rows.tolist() == [entry.row for entry in found]
    return found


def check(pack: Microbatch, found: list[Entry], size: int) -> None:
    """All that a pack promises of itself."""
    assert 1 <= pack.size == len(found) <= size
    clients = [(row, list(group)) for row, group in groupby(found, lambda entry: entry.row)]
    assert pack.clients.tolist() == [row for row, _ in clients]
    assert len(set(pack.clients.tolist())) == len(pack.clients)
    assert pack.entries.tolist() == [len(group) for _, group in clients]
    units = [len(list(group)) for _, group in groupby(found, lambda entry: (entry.row, entry.unit))]
    assert pack.unit_sizes.tolist() == units
    assert pack.units.tolist() == [len({entry.unit for entry in group}) for _, group in clients]


def taken(queue: EntryQueue, sizes: list[int], known: list[Entry]) -> list[Microbatch]:
    """Everything that waits, in packs of these sizes, over and over."""
    packs = []
    while len(queue):
        size, before = sizes[len(packs) % len(sizes)], len(queue)
        pack = queue.pop(size)
        assert len(queue) == before - pack.size
        check(pack, entries_of(pack, known), size)
        packs.append(pack)
    return packs


@given(steps=STEPS, sizes=SIZES)
def test_every_entry_comes_once_and_in_order(steps: list[Step], sizes: list[int]) -> None:
    known = waiting(steps)
    packs = taken(queue_of(steps), sizes, known)
    assert [entry for pack in packs for entry in entries_of(pack, known)] == known


@given(steps=STEPS, sizes=SIZES)
def test_units_are_whole_or_in_pieces_of_their_own(steps: list[Step], sizes: list[int]) -> None:
    known = waiting(steps)
    begun = 0  # entries of the unit in pieces that are out already
    for place, pack in enumerate(taken(queue_of(steps), sizes, known)):
        size, found = sizes[place % len(sizes)], entries_of(pack, known)
        if begun or found[0].per_unit > size:
            assert pack.piece
            assert len({(entry.row, entry.unit) for entry in found}) == 1
            assert pack.size == min(size, found[0].per_unit - begun)  # as much of it as goes in
            begun += pack.size
            assert pack.last == (begun == found[0].per_unit)
            begun = 0 if pack.last else begun
        else:
            assert not pack.piece
            assert pack.last
            for unit, group in groupby(found, lambda entry: (entry.row, entry.unit, entry.per_unit)):
                assert len(list(group)) == unit[2]
    assert begun == 0


@given(steps=STEPS, sizes=SIZES)
def test_packs_are_as_full_as_whole_units_let_them(steps: list[Step], sizes: list[int]) -> None:
    known = waiting(steps)
    packs = taken(queue_of(steps), sizes, known)
    for place, (pack, following) in enumerate(pairwise(packs)):
        if not pack.piece:
            assert pack.size + known[int(following.examples[0])].per_unit > sizes[place % len(sizes)]


@given(steps=STEPS, sizes=SIZES, data=st.data())
def test_dropping_forgets_one_client_alone(steps: list[Step], sizes: list[int], data: st.DataObject) -> None:
    """Also amid a unit that is half out."""
    known, queue = waiting(steps), queue_of(steps)
    out: list[Entry] = []
    for _ in range(data.draw(st.integers(0, 5))):
        if len(queue):
            out += entries_of(queue.pop(data.draw(st.integers(1, 9))), known)
    gone = data.draw(st.integers(0, 9))
    queue.drop(gone)
    rest = [entry for entry in known[len(out) :] if entry.row != gone]
    assert len(queue) == len(rest)
    left = [entry for pack in taken(queue, sizes, known) for entry in entries_of(pack, known)]
    assert left == rest


@given(units=st.integers(1, 4), per_unit=st.integers(1, 5), more=st.integers(0, 3), clients=st.integers(1, 3))
def test_filled_packs_have_one_shape(units: int, per_unit: int, more: int, clients: int) -> None:
    """What they are filled up with weighs nothing, in whole units of the last client, and isn't counted as its own."""
    steps = [Step(row, units, per_unit) for row in range(clients)]
    size = (clients * units + more) * per_unit
    pack = queue_of(steps).pop(size)
    full = pack.padded(size)
    assert full.size == size
    assert all(len(full[place]) == size for place in range(5))
    assert full.weights[: pack.size].tolist() == pack.weights.tolist()
    assert full.weights[pack.size :].tolist() == [0.0] * (size - pack.size)
    assert full.unit_sizes.tolist() == [per_unit] * (size // per_unit)
    assert full.units.tolist() == [*[units] * (clients - 1), units + more]
    assert full.entries.tolist() == pack.entries.tolist()


def test_a_filled_piece_stays_one_unit() -> None:
    queue = queue_of([Step(row=0, units=1, per_unit=5)])
    whole, rest = (queue.pop(3).padded(3) for _ in range(2))
    assert [whole.unit_sizes.tolist(), rest.unit_sizes.tolist()] == [[3], [3]]
    assert (rest.units.tolist(), rest.entries.tolist(), rest.weights[2:].tolist()) == ([1], [2], [0.0])
    assert rest.last


@pytest.mark.parametrize(
    ("steps", "size"), [([Step(0, 1, 2), Step(1, 1, 3)], 7), ([Step(0, 2, 2)], 5), ([Step(0, 2, 1)], 1)]
)
def test_what_makes_no_whole_units_is_not_filled_up(steps: list[Step], size: int) -> None:
    with pytest.raises(ValueError, match="can't be padded"):
        queue_of(steps).pop(9).padded(size)


@given(steps=STEPS, later=STEPS, sizes=SIZES)
def test_who_comes_later_waits_behind(steps: list[Step], later: list[Step], sizes: list[int]) -> None:
    """Clients that are through push their next step while others still wait."""
    later = [step._replace(row=step.row + 100) for step in later]
    queue, known = queue_of(steps), waiting(steps + later)
    out = entries_of(queue.pop(sizes[0]), known) if len(queue) else []
    push(queue, later, known)
    assert out + [entry for pack in taken(queue, sizes, known) for entry in entries_of(pack, known)] == known


def test_the_first_unit_is_told() -> None:
    queue = queue_of(
        [Step(row=3, units=0, per_unit=9), Step(row=1, units=2, per_unit=4), Step(row=2, units=1, per_unit=1)]
    )
    assert queue.unit == 4  # an empty batch doesn't wait
    queue.pop(8)
    assert queue.unit == 1


@pytest.mark.parametrize("size", [4, 5, 7])
def test_a_unit_that_just_fits_is_whole(size: int) -> None:
    pack = queue_of([Step(row=0, units=3, per_unit=4)]).pop(size)
    assert (pack.piece, pack.last, pack.size) == (False, True, 4)
