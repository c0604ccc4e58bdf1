"""Garbage collection is paused for imports, and only for them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from common.imports import collection_paused


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if enabled else gc.disable)()


def test_no_collection_while_paused() -> None:
    garbage = weakref.ref(_Cycle())
    with collection_paused():
        kept = [[number] for number in range(10 * gc.get_threshold()[0])]
        assert garbage() is not None
    kept += [[number] for number in range(10 * gc.get_threshold()[0])]
    assert garbage() is None


def test_nested_pause_ends_with_the_outer() -> None:
    with collection_paused():
        with collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collector_of_the_caller_stays_off() -> None:
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()


def test_error_ends_the_pause() -> None:
    with pytest.raises(ImportError), collection_paused():
        raise ImportError
    assert gc.isenabled()
