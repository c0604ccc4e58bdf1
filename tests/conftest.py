"""Shared fixtures: a tiny base for the whole session."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads slow down tiny layers on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from bench.lib.tiny import ATTENTION, save_pipeline
from models.base.base import Base


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(pipeline_folder: Path) -> Base:
    return Base(pipeline_folder, sites=ATTENTION)
