"""Tiers of tests: mark, order and check them, and report their CPU time.

| tier | a test of it |
|---|---|
| unit (no mark) | takes less than half a second of CPU and starts no Python process |
| integration | runs whole commands, child processes or several rounds, in at most 15 seconds of CPU |
| stress | is one of a kill matrix or an exhaustive grid, or takes longer |
"""

from __future__ import annotations

import os
import resource
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

UNIT_SECONDS = 0.5
"""CPU time of a unit test's own call. Longer ones are listed after the run; they don't fail, since time is no fault."""

_PYTHON = ("python", "anther", "flower", "flwr")  # how the names of executables begin that run Python
_FORKS = ("os.fork", "os.forkpty")


class Tiers:
    """A pytest plugin that holds tests to their tiers.

    With several workers, each gets its part of the integration tests first and then its part of the unit tests: what
    is stolen at the end is short, so all workers end at about the same time.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.workers: int = getattr(config, "workerinput", {}).get("workercount", 1)
        self.children: list[str] = []  # Python processes that the current test started
        self.seconds: Counter[str] = Counter()
        self.long: list[tuple[float, str]] = []
        sys.addaudithook(self._audit)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark unit tests, so that `-m unit` selects them."""
        for item in items:
            if tier(item) == "unit":
                item.add_marker(pytest.mark.unit)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Order the selected tests."""
        session.items = dealt(session.items, self.workers)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        self.children.clear()
        yield
        self._check(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        before = _cpu_seconds()
        yield
        item.user_properties.append(("call", _cpu_seconds() - before))
        self._check(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, bool, bool]:
        item.user_properties.append(("start", _cpu_seconds()))
        return (yield)

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        start = dict(item.user_properties)["start"]
        item.user_properties.append(("tier", (tier(item), _cpu_seconds() - start)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up CPU time; with several workers, this runs in the controller."""
        if report.when != "teardown":
            return
        properties = dict(report.user_properties)
        name, seconds = properties["tier"]
        self.seconds[name] += seconds
        if name == "unit" and properties.get("call", 0.0) > UNIT_SECONDS:
            self.long.append((properties["call"], report.nodeid))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.seconds:
            return
        terminalreporter.section("CPU time", sep="-")
        terminalreporter.line(", ".join(f"{name} {seconds:.0f} s" for name, seconds in sorted(self.seconds.items())))
        for seconds, test in sorted(self.long, reverse=True):
            terminalreporter.line(f"{seconds:5.1f} s in a unit test: {test}")

    def _check(self, item: pytest.Item) -> None:
        if self.children and tier(item) == "unit":
            pytest.fail(
                f"a unit test started {self.children[0]}; mark it @pytest.mark.integration (CONTRIBUTING.md)",
                pytrace=False,
            )

    def _audit(self, event: str, arguments: tuple) -> None:
        if event in _FORKS:
            self.children.append("a fork")
        elif event == "subprocess.Popen":
            name = Path(os.fsdecode(arguments[0] or arguments[1][0])).name
            if name.startswith(_PYTHON):
                self.children.append(name)


def tier(item: pytest.Item) -> str:
    """Name the tier of a test: the longest that it, one of its parameters or its module is marked with."""
    return next((name for name in ("stress", "integration") if item.get_closest_marker(name)), "unit")


def dealt(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Order tests for `--dist worksteal`, which first gives each worker an equal share of the list.

    Args:
        items: Tests in the order of their collection, which is kept within a share: neighbors share fixtures.
        workers: Number of shares.

    Returns:
        The tests, with those that aren't unit tests at the start of each share.
    """
    short = [item for item in items if tier(item) == "unit"]
    long = [item for item in items if tier(item) != "unit"]

    def part(tests: list[pytest.Item], worker: int) -> list[pytest.Item]:
        return tests[worker * len(tests) // workers : (worker + 1) * len(tests) // workers]

    return [item for worker in range(workers) for item in (*part(long, worker), *part(short, worker))]


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)
