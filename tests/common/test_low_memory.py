"""Imports of a process with little memory, tested in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import low_memory

pytestmark = pytest.mark.integration

SCRIPT = """
import sys
from common import low_memory
with low_memory.imports():
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
print(sorted({"transformers", "peft", "accelerate", "scipy"} & sys.modules.keys()))
UNet2DConditionModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
from models.quantization.packed import skeleton
import accelerate, transformers
print(transformers.__version__ > "")
"""


def test_networks_import_no_unneeded_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **low_memory.ENVIRONMENT},
    )
    assert done.stdout.splitlines() == ["[]", "True"], done.stderr


def test_earlier_imports_stay() -> None:
    import transformers

    with low_memory.imports():
        assert sys.modules["transformers"] is transformers
    assert sys.modules["transformers"] is transformers
    assert None not in sys.modules.values()
