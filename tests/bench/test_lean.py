"""The ladder of memory on a base that is small enough for any test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import lean


def test_the_ladder_is_written_with_every_rung_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "lean.json"
    command = ["--workload", "tiny", "--side", "8", "--folder", str(tmp_path), "--output", str(output)]

    def here(*arguments: str, allocator: bool = False) -> str:  # noqa: ARG001 - another process is spared
        monkeypatch.setattr(sys, "argv", ["bench.lean", *arguments])
        lean.main()
        return (capsys.readouterr().out.splitlines() or [""])[-1]

    monkeypatch.setattr(lean, "child", here)
    monkeypatch.setattr(sys, "argv", ["bench.lean", *command, "--rungs", "mixed", "mixed, pages, blocks"])
    lean.main()
    rungs = json.loads(output.read_text())["rungs"]
    assert list(rungs) == ["float32", "mixed", "mixed, pages, blocks"]
    first, mixed, last = rungs.values()
    assert first["cosine"] == pytest.approx(1.0, abs=1e-9)
    assert 0.9 < mixed["cosine"] < 1 - 1e-6
    assert last["cosine"] == mixed["cosine"]  # levers that only save memory leave the gradient as it is
    assert 0 < last["tensors"] < mixed["tensors"]
    assert all(found["peak"] > found["imports"] for found in rungs.values())
