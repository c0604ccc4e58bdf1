"""Samples of parametrized tests: the other cases are stress tests."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet


def sampled(cases: Iterable[Any], kept: Container[Any]) -> list[ParameterSet]:
    """Mark all cases but the `kept` ones as stress tests; a tuple has a value for each argument."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in kept else (pytest.mark.stress,)
        )
        for case in cases
    ]
