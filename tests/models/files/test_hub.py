"""Published pipelines by name, from a local cache in the hub's layout; nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from bench.lib.tiny import ATTENTION, save_pipeline
from common.errors import AntherError
from models.base.base import load
from models.files import assets
from models.files.hub import is_repo_id


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("stabilityai/sdxl-turbo", True),
        ("org/v1.5_x", True),
        ("glyphs", False),
        ("./org/name", False),
        ("/org/name", False),
        ("org/name/part", False),
        ("../name", False),
        ("org/", False),
    ],
)
def test_is_repo_id(text: str, valid: bool) -> None:
    assert is_repo_id(text) == valid


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return tmp_path / "hub"


def test_cached_pipeline_is_found(cache: Path, tmp_path: Path) -> None:
    commit = "0" * 40
    cached = cache / "models--org--tiny"
    folder = cached / "snapshots" / commit
    shutil.copytree(save_pipeline(tmp_path / "made"), folder)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert assets.locate("org/tiny") == folder
    base = load("org/tiny", sites=ATTENTION)
    assert base.hash == assets.digest(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_unavailable_pipeline_is_refused(cache: Path) -> None:  # noqa: ARG001
    with pytest.raises(AntherError, match=r"^org/absent: no such folder, and not available from the hub") as refusal:
        assets.locate("org/absent")
    assert "\n" not in str(refusal.value)
