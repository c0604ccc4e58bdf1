"""Shared fixtures: a tiny base for the whole session. Tiers of tests and the profiles of Hypothesis."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads slow down tiny layers on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

from common.imports import collection_paused
from tests.helpers.shared import shared_folder
from tests.helpers.tiers import Tiers

if TYPE_CHECKING:
    from models.base.base import Base

# No limits on time, which fail on a busy machine.
# --hypothesis-profile=stress, or HYPOTHESIS_PROFILE=stress, tries more.
settings.register_profile("tests", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("stress", settings.get_profile("tests"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tiers(config))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Pause garbage collection, which takes a third of the time of the modules' imports; all of them stay."""
    with collection_paused():
        result = yield
    gc.freeze()  # the collections between tests needn't traverse them either
    return result


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bench.lib.tiny import save_pipeline  # imports PyTorch and, when called, a pipeline of diffusers

    return shared_folder(tmp_path_factory, "base", save_pipeline) / "pipeline"


@pytest.fixture(scope="session")
def base(pipeline_folder: Path) -> Base:
    from bench.lib.tiny import ATTENTION
    from models.base.base import Base

    return Base(pipeline_folder, sites=ATTENTION)
