"""Small simulations from the command line, in the test's process, in a fork of it, or in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import numpy as np
import pytest
from PIL import Image

from simulations import run as application
from tests.helpers.kills import in_child

TINY = [
    "data.writers=3",
    "data.test=3",
    "data.validation=2",
    "rounds=3",
    "adapter.shared.steps=2",
    "adapter.shared.rank=4",
    "adapter.personal.steps=4",
    "adapter.personal.rank=2",
    "adapter.eval_interval=2",
    "evaluation.timesteps=2",
    "evaluation.gallery_size=2",
    "evaluation.sampling_steps=2",
    "base.device=cpu",
]
BARE = ["evaluation.gallery_size=0", "evaluation.baseline_local=false"]
"""Overrides for runs whose generated pictures are not tested."""
ROOT = Path(__file__).parents[2]


def start(words: list[str]) -> subprocess.Popen[str]:
    """Start a command of Python in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def arguments(base: Path, folder: Path, *overrides: str) -> list[str]:
    """Return the overrides of a tiny simulation."""
    return [f"base.path={base}", *TINY, *overrides, f"hydra.run.dir={folder}"]


def run(base: Path, folder: Path, *overrides: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """Run a tiny simulation by its command line in this process, which has already imported the libraries.

    Args:
        base: folder of its base.
        folder: its output folder.
        overrides: more words of its command line.
        encoding: encoding of its terminal.

    Returns:
        Its exit code and its output.
    """
    words = arguments(base, folder, *overrides)
    out, errors = (TextIOWrapper(BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    code = _run(words, out, errors)
    texts = [stream.buffer.getvalue().decode(encoding) for stream in (out, errors)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(words, code, *texts)


def interrupt(base: Path, folder: Path, *overrides: str, line: str, number: int) -> tuple[int, str, str]:
    """Run a tiny simulation in a fork, which gets a signal a moment after it prints a line with this text.

    Args:
        base: folder of its base.
        folder: its output folder.
        overrides: more words of its command line.
        line: text of the line.
        number: the signal.

    Returns:
        The exit code (negative for a signal), the output, and the errors.
    """
    words = arguments(base, folder, *overrides)
    with TemporaryDirectory() as texts:
        files = [Path(texts) / name for name in ("out", "errors")]

        def work() -> None:
            out, errors = (file.open("w", buffering=1) for file in files)
            os._exit(_run(words, _SignalAfter(out, line, number), errors))

        return in_child(work), *(file.read_text() for file in files)


class _SignalAfter:
    """Text stream that sends this process a signal 0.1 seconds after a line, in the middle of the next round."""

    def __init__(self, stream: TextIO, line: str, number: int) -> None:
        self._stream, self._line, self._number = stream, line, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._line in text:
            threading.Timer(0.1, os.kill, (os.getpid(), self._number)).start()
        return self._stream.write(text)


def _run(words: list[str], out: Any, errors: Any) -> int:
    application._completed.clear()  # each call is a command of its own
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["run.py", *words])
        patch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it for its process
        try:
            application.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    """Return all results of a run except durations and memory: summary, rounds and evaluation."""
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in [summary, *metrics]:
        for key in ("seconds", "peak_rss_mib"):
            line.pop(key, None)
    return summary, metrics, json.loads((folder / "evaluation.json").read_text())


def own_pictures(folder: Path, count: int = 6) -> Path:
    """Write a folder in the imagefolder convention."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (30, 40, 3), np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"my picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
