"""The plugin that holds tests to their tiers, in a pytest of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFTEST = """
from tests.helpers.tiers import Tiers

def pytest_configure(config):
    config.pluginmanager.register(Tiers(config))
"""
TESTS = """
import os, subprocess, sys, pytest

def test_a():
    sum(range(10**8))

@pytest.mark.integration
@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.stress)])
def test_b(x):
    subprocess.run([sys.executable, "-c", ""])

def test_c():
    subprocess.run([sys.executable, "-c", ""])

def test_d():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

@pytest.fixture
def child():
    subprocess.run(["python3", "-c", ""])

def test_e(child):
    pass

def test_f():
    subprocess.run(["true"])

@pytest.mark.integration
def test_g():
    pass
"""


def run_pytest(folder: Path, *words: str) -> str:
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_tier.py").write_text(TESTS)
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\nmarkers =\n  unit\n  integration\n  stress\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


@pytest.mark.integration
def test_unit_tests_start_no_python(tmp_path: Path) -> None:
    output = run_pytest(tmp_path / "all", "-v")
    result = dict(re.findall(r"^test_tier\.py::(test_\S+) (\w+)", output, re.MULTILINE))
    assert [name for name, word in result.items() if word in ("FAILED", "ERROR")] == ["test_c", "test_d", "test_e"]
    assert output.count("mark it @pytest.mark.integration") >= 3
    assert list(result)[:3] == ["test_b[1]", "test_b[2]", "test_g"]  # before the unit tests
    assert re.search(r"s in a unit test: test_tier\.py::test_a\n", output)
    assert re.search(r"^integration \d+ s, stress \d+ s, unit \d+ s$", output, re.MULTILINE)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("expression", "tests"),
    [
        ("unit", {"test_a", "test_c", "test_d", "test_e", "test_f"}),
        ("not stress", {"test_a", "test_b[1]", "test_c", "test_d", "test_e", "test_f", "test_g"}),
        ("stress", {"test_b[2]"}),
    ],
)
def test_expressions_select_tiers(expression: str, tests: set[str], tmp_path: Path) -> None:
    output = run_pytest(tmp_path / "some", "--collect-only", "-q", "-m", expression)
    assert set(re.findall(r"^test_tier\.py::(\S+)$", output, re.MULTILINE)) == tests


@pytest.mark.integration
def test_workers_begin_with_integration_tests(tmp_path: Path) -> None:
    output = run_pytest(tmp_path / "two", "-v", "-n", "2", "--dist", "worksteal", "-m", "not stress")
    run = re.findall(r"^\[gw(\d)\].* (\w+) test_tier\.py::(\S+)", output, re.MULTILINE)
    first = {worker: next(name for one, _, name in run if one == worker) for worker, *_ in run}
    assert set(first.values()) == {"test_b[1]", "test_g"}
    assert re.search(r"^integration \d+ s, unit \d+ s$", output, re.MULTILINE)  # added up over workers
