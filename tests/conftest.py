"""Shared fixtures: a tiny base for the whole session. Tiers of tests and the profiles of Hypothesis."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads slow down tiny layers on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

from bench.lib.tiny import ATTENTION, save_pipeline
from models.base.base import Base
from tests.helpers.tiers import Tiers

# No limits on time, which fail on a busy machine.
# --hypothesis-profile=stress, or HYPOTHESIS_PROFILE=stress, tries more.
settings.register_profile("tests", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("stress", settings.get_profile("tests"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tiers(config))


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(pipeline_folder: Path) -> Base:
    return Base(pipeline_folder, sites=ATTENTION)
