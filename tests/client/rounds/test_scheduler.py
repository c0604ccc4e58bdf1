"""Advancing many request handlers: their jobs are performed together, and failures stay separate."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from client.rounds.scheduler import run_handlers
from protocol.messages import Personalized


def talk(name: str, turns: int) -> Generator[Any, Any, Any]:
    """Request `turns` jobs and reply with their results."""
    results = []
    for turn in range(turns):
        results.append((yield (name, turn)))
    return name, results


def test_jobs_are_performed_together() -> None:
    batches = []

    def perform(jobs: list[Any]) -> list[Any]:
        batches.append(jobs)
        return [f"{name}{turn}" for name, turn in jobs]

    outcomes = run_handlers({"a": talk("a", 2), "b": talk("b", 0), "c": talk("c", 1)}, perform)
    assert batches == [[("a", 0), ("c", 0)], [("a", 1)]]
    assert outcomes == {"a": ("a", ["a0", "a1"]), "b": ("b", []), "c": ("c", ["c0"])}
    assert list(outcomes) == ["a", "b", "c"]


def test_failed_job_is_raised_in_its_handler() -> None:
    def mending() -> Generator[Any, Any, Any]:
        try:
            yield ("fails", 0)
        except MemoryError:
            return (yield ("smaller", 0))

    def perform(jobs: list[Any]) -> list[Any]:
        return [MemoryError(name) if name == "fails" else name for name, _ in jobs]

    outcomes = run_handlers({1: talk("fails", 3), 2: talk("b", 2), 3: mending()}, perform)
    assert isinstance(outcomes[1], MemoryError)
    assert outcomes[2] == ("b", ["b", "b"])
    assert outcomes[3] == "smaller"


def test_failing_handler_does_not_affect_others() -> None:
    def broken() -> Generator[Any, Any, Any]:
        raise ValueError("at once")
        yield

    outcomes = run_handlers({1: broken(), 2: talk("b", 1)}, lambda jobs: [name for name, _ in jobs])
    assert str(outcomes[1]) == "at once"
    assert outcomes[2] == ("b", ["b"])


def test_interrupt_is_raised() -> None:
    def perform(_jobs: list[Any]) -> list[Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_handlers({1: talk("a", 1)}, perform)

    def interrupted() -> Generator[Any, Any, Any]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        run_handlers({1: interrupted()}, lambda jobs: jobs)


def test_no_handlers() -> None:
    def perform(_jobs: list[Any]) -> list[Any]:
        raise AssertionError("there are no jobs")

    assert run_handlers({}, perform) == {}
    reply = Personalized(device="d", seconds=1, joules=1, quality="estimate")

    def silent() -> Generator[Any, Any, Personalized]:
        return reply
        yield

    assert run_handlers({1: silent()}, perform) == {1: reply}
