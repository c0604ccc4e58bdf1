"""Tiny base in float64, for results that have to agree to ten digits."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.lib.tiny import ATTENTION
from models.base.base import Base


@pytest.fixture(scope="session")
def fine(pipeline_folder: Path) -> Base:
    return Base(pipeline_folder, sites=ATTENTION, compute="fp64")
