"""Optional libraries: tests run without them, and a missing one is reported in one line that names its extra."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helpers.simulations import run

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
FOR_TESTS = ("test", "dev")


def names(requirements: list[str]) -> set[str]:
    """Return the packages of requirements, with those of an extra that is required as part of this package."""
    found = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w.-]+)(\[[\w,-]+\])?", requirement).groups()  # type: ignore[union-attr]
        if name == "anther":
            found |= {each for extra in extras.strip("[]").split(",") for each in names(EXTRAS[extra])}
        else:
            found.add(f"{name}{extras or ''}")
    return found


def test_tests_install_no_optional_library() -> None:
    optional = {extra: names(required) for extra, required in EXTRAS.items() if extra not in FOR_TESTS}
    assert optional.keys() == {"examples", "heic", "ray"}  # tests below, and in tests/client/data/test_odd_files.py
    assert names(EXTRAS["dev"]) & set().union(*optional.values()) == set()


def test_missing_ray_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    done = run(tmp_path / "no base", tmp_path / "run", "grid=ray")  # before the base is loaded
    assert (done.returncode, done.stderr) == (2, "error: grid=ray: Ray is not installed: pip install 'anther[ray]'\n")


@pytest.mark.integration
def test_missing_matplotlib_is_one_line() -> None:
    script = ROOT / "examples" / "simulate_and_plot.py"
    without = (
        f"import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "matplotlib is not installed: pip install -e '.[examples]'\n"
