"""Shared fixtures: one tiny base for the whole session."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.base import Base
from tests.tiny import ATTENTION, save_pipeline


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(pipeline_folder: Path) -> Base:
    return Base(pipeline_folder, sites=ATTENTION)
