"""Fixtures of tests of whole rounds and whole simulations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.shared import shared_folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: synchronizing several takes longer than a pass of such a small network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished tiny simulation, `run`, and of its output, `stdout`."""

    def make(folder: Path) -> None:
        from tests.helpers.simulations import run

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ANTHER_HOME", str(folder / "home"))
            done = run(pipeline_folder, folder / "run")
        assert done.returncode == 0, done.stderr
        (folder / "stdout").write_text(done.stdout)

    return shared_folder(tmp_path_factory, "finished", make)
