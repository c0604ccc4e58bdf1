"""Code snippets of a report that load an adapter run as printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.base.base import Base
from models.base.pack import pack
from models.export import adapter_files
from server.report.snippet import loading_snippet
from tests.helpers.adapters import random_adapter
from tests.models.conftest import TinyPipeline

ROOT = Path(__file__).parents[3]


@pytest.mark.stress
def test_printed_lines_run(tiny: TinyPipeline, tmp_path: Path) -> None:
    """In a separate process and another folder; the adapter has an effect."""
    name, script = 'it\'s <a> "name".with_shared', "import os\nimport torch\n"
    learnt = random_adapter(tiny.base.sites, 1)
    for kind, strength in (("plain", 0), ("learnt", 1)):
        adapter = {site: factors._replace(b=strength * factors.b) for site, factors in learnt.items()}
        folder = tmp_path / kind
        adapter_files.write(folder / "personal", name, adapter, tiny.base, "shared+personal")
        lines = loading_snippet(tiny.base, folder).lines(f"personal/{name}.safetensors", 'fox \'n "hound"')
        picture = str(tmp_path / f"{kind}.png")
        script += (
            f"torch.manual_seed(0)\n{lines.replace('steps=20', 'steps=2')}\nos.replace('picture.png', {picture!r})\n"
        )
    (there := tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=there, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plain, under = (np.array(Image.open(tmp_path / f"{kind}.png")).astype(int) for kind in ("plain", "learnt"))
    assert plain.shape[:2] == (tiny.base.resolution,) * 2
    assert np.abs(plain - under).max() > 2


@pytest.mark.integration
def test_packed_base_is_reported(pipeline_folder: Path, tmp_path: Path) -> None:
    pack(str(pipeline_folder), tmp_path / "packed", "int8")
    use = loading_snippet(Base(tmp_path / "packed"), tmp_path)
    assert use.packed
    assert str(tmp_path / "packed") not in use.lines("shared.safetensors", "a")
