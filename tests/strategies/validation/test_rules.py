"""Rules on combinations: each is reached from a configuration and from parts where both exist, with the same text."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from common.errors import AntherError
from conf.components import GROUPS, ComponentConfig
from server.rounds.fedbuff import FedBuffRunner
from server.rounds.sync import RoundLimits
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.fedit import FedIT
from strategies.factory.combination import check_configuration
from strategies.registry import AGGREGATIONS
from strategies.validation import personalization, privacy, rules
from tests.helpers.central import central_dp
from tests.helpers.configs import compose
from tests.helpers.fleet import perform, strategy
from tests.helpers.refusals import CASES, Case, Undeclared


@pytest.fixture(autouse=True)
def _undeclared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGGREGATIONS, "undeclared", Undeclared)


@functools.cache
def default() -> Any:
    return compose("aggregation=fedit")


def refusal_of_configuration(case: Case) -> str:
    config = deepcopy(default())
    for key, value in (case.config or {}).items():
        group, _, name = key.rpartition(".")
        if key == "robust":
            value = {rule: {} for rule in value}
        elif key in GROUPS:
            value = value if isinstance(value, ComponentConfig) else ComponentConfig(value)
        setattr(functools.reduce(getattr, group.split("."), config) if group else config, name, value)
    with pytest.raises(AntherError) as caught:
        check_configuration(config)
    return str(caught.value)


def refusal_of_parts(case: Case, folder: Path) -> str:
    parts = {"aggregation": FedIT(), **(case.parts or {})}
    if "central_dp" in parts:
        parts["central_dp"] = central_dp(folder, **parts["central_dp"])
    if case.buffer_size is None:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the caller compares the text)
            strategy(**parts)
    else:
        federated = strategy(**parts)  # rounds that don't overlap
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            FedBuffRunner(CohortGrid([], perform), federated, RoundLimits(), size=case.buffer_size, concurrency=1)
    assert isinstance(caught.value, AntherError)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason[:60])
def test_refusal(case: Case, tmp_path: Path) -> None:
    texts = [refusal_of_configuration(case)] if case.config is not None else []
    texts += [refusal_of_parts(case, tmp_path)] if case.parts is not None else []
    assert texts[0].startswith(case.reason)
    assert texts[0] == texts[-1]
    assert "\n" not in texts[0]


def returns(module: ModuleType) -> Iterator[int]:
    """Yield the lines of a module that return something else than None."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Return) and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield node.lineno


def executed(module: ModuleType, call: Callable[[], object]) -> set[int]:
    """Return the lines of a module that a call executes."""
    lines: set[int] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            lines.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.integration
@pytest.mark.parametrize("module", [privacy, rules, personalization], ids=["privacy", "rules", "personalization"])
def test_cases_reach_every_reason(module: ModuleType, tmp_path: Path) -> None:
    def refuse_all() -> None:
        for case in CASES:
            if case.config is not None:
                refusal_of_configuration(case)
            else:
                refusal_of_parts(case, tmp_path)

    assert set(returns(module)) - executed(module, refuse_all) == set()
