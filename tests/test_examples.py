"""The scripts in examples/ run as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(script: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_compiles_and_is_documented(path: Path) -> None:
    code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    assert code.co_consts[0].strip().startswith(("Simulate", "Load", "Run"))


@pytest.mark.stress
def test_own_strategy() -> None:
    assert "round 3:" in run("own_strategy.py")


@pytest.mark.stress
def test_simulated_adapter_loads_in_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert "below the base" in run("simulate_and_plot.py", str(tmp_path / "run"))
    assert (tmp_path / "run" / "loss.svg").exists()
    run(
        "load_in_diffusers.py",
        str(tmp_path / "run" / "adapters" / "shared.safetensors"),
        "--out",
        str(tmp_path / "adapter.png"),
    )
    assert (tmp_path / "adapter.png").exists()
