"""The queue compared with a list: every entry once, in order, in whole units, for any sizes of microbatches."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.batches import EntryQueue, Microbatch, StepBatch


class _ClientStep(NamedTuple):
    """Step of one client."""

    row: int
    units: int
    per_unit: int


class _EntryRecord(NamedTuple):
    """Entry, with its client, unit and step."""

    row: int
    unit: int  # of its client's step
    per_unit: int
    example: int


STEPS = st.lists(
    st.builds(_ClientStep, row=st.integers(0, 9), units=st.integers(0, 4), per_unit=st.integers(1, 6)),
    max_size=6,
    unique_by=lambda step: step.row,  # a client has one step at a time
)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def entries_of_steps(steps: list[_ClientStep]) -> list[_EntryRecord]:
    """List all entries in the order of the queue, with distinct examples."""
    places = [(step, index) for step in steps for index in range(step.units * step.per_unit)]
    return [_EntryRecord(s.row, index // s.per_unit, s.per_unit, example) for example, (s, index) in enumerate(places)]


def push(queue: EntryQueue, steps: list[_ClientStep], records: list[_EntryRecord]) -> None:
    for step in steps:
        examples = np.array([entry.example for entry in records if entry.row == step.row], np.int64)
        queue.push(step.row, StepBatch(examples, examples / 1000, -examples, examples / 7, step.per_unit))


def queue_of(steps: list[_ClientStep]) -> EntryQueue:
    queue = EntryQueue()
    push(queue, steps, entries_of_steps(steps))
    return queue


def entries_of(pack: Microbatch, records: list[_EntryRecord]) -> list[_EntryRecord]:
    """List the entries of a microbatch, with all their fields."""
    assert (pack.phases == pack.examples / 1000).all()
    assert (pack.noise_keys == -pack.examples).all()
    assert (pack.weights == pack.examples / 7).all()
    result = [records[example] for example in pack.examples.tolist()]
    assert pack.rows.tolist() == [entry.row for entry in result]
    return result


def check(pack: Microbatch, found: list[_EntryRecord], size: int) -> None:
    """Check the invariants of a microbatch."""
    assert 1 <= pack.size == len(found) <= size
    clients = [(row, list(group)) for row, group in groupby(found, lambda entry: entry.row)]
    assert pack.clients.tolist() == [row for row, _ in clients]
    assert len(set(pack.clients.tolist())) == len(pack.clients)
    assert pack.entries.tolist() == [len(group) for _, group in clients]
    units = [len(list(group)) for _, group in groupby(found, lambda entry: (entry.row, entry.unit))]
    assert pack.unit_sizes.tolist() == units
    assert pack.units.tolist() == [len({entry.unit for entry in group}) for _, group in clients]


def pop_all(queue: EntryQueue, sizes: list[int], records: list[_EntryRecord]) -> list[Microbatch]:
    """Pop all entries, in microbatches of these sizes, cyclically."""
    microbatches = []
    while len(queue):
        size, before = sizes[len(microbatches) % len(sizes)], len(queue)
        microbatch = queue.pop(size)
        assert len(queue) == before - microbatch.size
        check(microbatch, entries_of(microbatch, records), size)
        microbatches.append(microbatch)
    return microbatches


@given(steps=STEPS, sizes=SIZES)
def test_entries_are_popped_once_in_order(steps: list[_ClientStep], sizes: list[int]) -> None:
    records = entries_of_steps(steps)
    microbatches = pop_all(queue_of(steps), sizes, records)
    assert [entry for microbatch in microbatches for entry in entries_of(microbatch, records)] == records


@given(steps=STEPS, sizes=SIZES)
def test_units_are_whole_or_in_separate_pieces(steps: list[_ClientStep], sizes: list[int]) -> None:
    records = entries_of_steps(steps)
    begun = 0  # popped entries of the unit in pieces
    for index, microbatch in enumerate(pop_all(queue_of(steps), sizes, records)):
        size, result = sizes[index % len(sizes)], entries_of(microbatch, records)
        if begun or result[0].per_unit > size:
            assert microbatch.piece
            assert len({(entry.row, entry.unit) for entry in result}) == 1
            assert microbatch.size == min(size, result[0].per_unit - begun)  # as much as fits
            begun += microbatch.size
            assert microbatch.last == (begun == result[0].per_unit)
            begun = 0 if microbatch.last else begun
        else:
            assert not microbatch.piece
            assert microbatch.last
            for unit, group in groupby(result, lambda entry: (entry.row, entry.unit, entry.per_unit)):
                assert len(list(group)) == unit[2]
    assert begun == 0


@given(steps=STEPS, sizes=SIZES)
def test_microbatches_are_as_full_as_possible(steps: list[_ClientStep], sizes: list[int]) -> None:
    records = entries_of_steps(steps)
    microbatches = pop_all(queue_of(steps), sizes, records)
    for index, (microbatch, following) in enumerate(pairwise(microbatches)):
        if not microbatch.piece:
            assert microbatch.size + records[int(following.examples[0])].per_unit > sizes[index % len(sizes)]


@given(steps=STEPS, sizes=SIZES, data=st.data())
def test_drop_removes_one_client(steps: list[_ClientStep], sizes: list[int], data: st.DataObject) -> None:
    """Also within a unit."""
    records, queue = entries_of_steps(steps), queue_of(steps)
    out: list[_EntryRecord] = []
    for _ in range(data.draw(st.integers(0, 5))):
        if len(queue):
            out += entries_of(queue.pop(data.draw(st.integers(1, 9))), records)
    gone = data.draw(st.integers(0, 9))
    queue.drop(gone)
    rest = [entry for entry in records[len(out) :] if entry.row != gone]
    assert len(queue) == len(rest)
    left = [entry for microbatch in pop_all(queue, sizes, records) for entry in entries_of(microbatch, records)]
    assert left == rest


@given(units=st.integers(1, 4), per_unit=st.integers(1, 5), more=st.integers(0, 3), clients=st.integers(1, 3))
def test_padded_microbatches_have_fixed_shapes(units: int, per_unit: int, more: int, clients: int) -> None:
    """Padding has weight 0, forms whole units of the last client, and is not counted as its own."""
    steps = [_ClientStep(row, units, per_unit) for row in range(clients)]
    size = (clients * units + more) * per_unit
    microbatch = queue_of(steps).pop(size)
    full = microbatch.padded(size)
    assert full.size == size
    assert all(len(full[index]) == size for index in range(5))
    assert full.weights[: microbatch.size].tolist() == microbatch.weights.tolist()
    assert full.weights[microbatch.size :].tolist() == [0.0] * (size - microbatch.size)
    assert full.unit_sizes.tolist() == [per_unit] * (size // per_unit)
    assert full.units.tolist() == [*[units] * (clients - 1), units + more]
    assert full.entries.tolist() == microbatch.entries.tolist()


def test_padded_piece_is_one_unit() -> None:
    queue = queue_of([_ClientStep(row=0, units=1, per_unit=5)])
    whole, rest = (queue.pop(3).padded(3) for _ in range(2))
    assert [whole.unit_sizes.tolist(), rest.unit_sizes.tolist()] == [[3], [3]]
    assert (rest.units.tolist(), rest.entries.tolist(), rest.weights[2:].tolist()) == ([1], [2], [0.0])
    assert rest.last


@pytest.mark.parametrize(
    ("steps", "size"),
    [([_ClientStep(0, 1, 2), _ClientStep(1, 1, 3)], 7), ([_ClientStep(0, 2, 2)], 5), ([_ClientStep(0, 2, 1)], 1)],
)
def test_incomplete_padding_is_rejected(steps: list[_ClientStep], size: int) -> None:
    with pytest.raises(ValueError, match="can't be padded"):
        queue_of(steps).pop(9).padded(size)


@given(steps=STEPS, later=STEPS, sizes=SIZES)
def test_queue_is_first_in_first_out(steps: list[_ClientStep], later: list[_ClientStep], sizes: list[int]) -> None:
    """Clients whose step is done push their next one behind the others."""
    later = [step._replace(row=step.row + 100) for step in later]
    queue, records = queue_of(steps), entries_of_steps(steps + later)
    out = entries_of(queue.pop(sizes[0]), records) if len(queue) else []
    push(queue, later, records)
    assert (
        out + [entry for microbatch in pop_all(queue, sizes, records) for entry in entries_of(microbatch, records)]
        == records
    )


def test_unit_of_the_first_step() -> None:
    queue = queue_of(
        [
            _ClientStep(row=3, units=0, per_unit=9),
            _ClientStep(row=1, units=2, per_unit=4),
            _ClientStep(row=2, units=1, per_unit=1),
        ]
    )
    assert queue.unit == 4  # an empty batch is not queued
    queue.pop(8)
    assert queue.unit == 1


@pytest.mark.parametrize("size", [4, 5, 7])
def test_unit_of_exact_size_is_whole(size: int) -> None:
    microbatch = queue_of([_ClientStep(row=0, units=3, per_unit=4)]).pop(size)
    assert (microbatch.piece, microbatch.last, microbatch.size) == (False, True, 4)
