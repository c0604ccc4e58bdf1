"""Output folders: resumed with the same settings, base, data and pictures, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from common.errors import AntherError
from conf.compose import compose
from models.base.base import Base
from privacy.storage import FileStorage
from simulations import run_dir
from simulations.fleet.participants import own_pictures_hash, participants
from tests.simulations.test_run import own_pictures

FRESH, RESUMED = compose("data.writers=0 data.pictures=[x]"), compose("data.writers=0 data.pictures=[x] resume=true")
ASSETS = {"base": "b", "data": "d"}


def replace_one(folder: Path) -> None:
    Image.new("RGB", (40, 30), (1, 2, 3)).save(folder / "0.png")


def rename_caption(folder: Path) -> None:
    sheet = folder / "metadata.jsonl"
    sheet.write_text(sheet.read_text().replace("my picture 3", "another picture"))


@pytest.mark.parametrize("change", [replace_one, rename_caption])
def test_replaced_pictures_are_refused(base: Base, tmp_path: Path, change: Callable[[Path], None]) -> None:
    mine = own_pictures(tmp_path / "mine")

    def current_hash() -> str:
        config = compose(f"data.writers=1 'data.pictures=[{mine}]'")
        digest = own_pictures_hash(participants(config, base, lambda name: FileStorage(tmp_path / name)))
        assert digest is not None
        return digest

    before = current_hash()
    assert current_hash() == before
    run_dir.claim(tmp_path / "run", FRESH, {**ASSETS, run_dir.PICTURES: before}, memory=7)
    assert run_dir.claim(tmp_path / "run", RESUMED, {**ASSETS, run_dir.PICTURES: current_hash()}, memory=9) == 7
    change(mine)
    with pytest.raises(AntherError, match="was run with another set of pictures"):
        run_dir.claim(tmp_path / "run", RESUMED, {**ASSETS, run_dir.PICTURES: current_hash()}, memory=9)


def test_writers_have_no_own_pictures(base: Base, tmp_path: Path) -> None:
    assert (
        own_pictures_hash(participants(compose("data.writers=2"), base, lambda name: FileStorage(tmp_path / name)))
        is None
    )


def test_older_run_is_resumed_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir.claim(tmp_path / "run", FRESH, ASSETS, memory=7)
    assert "background" not in json.loads((tmp_path / "run/run.json").read_text())["config"]["data"]
    assert run_dir.claim(tmp_path / "run", RESUMED, {**ASSETS, run_dir.PICTURES: "p"}, memory=9) == 7
    assert "is unknown" in caplog.text


def test_added_setting_counts_if_set(tmp_path: Path) -> None:
    black = compose("data.writers=0 data.pictures=[x] data.background=black resume=true")
    assert run_dir.config_hash(black) != run_dir.config_hash(FRESH)
    run_dir.claim(tmp_path / "run", FRESH, ASSETS, memory=7)
    with pytest.raises(AntherError, match=r"data\.background was None, now black"):
        run_dir.check(tmp_path / "run", black)


def test_hash_is_that_of_the_first_key_names() -> None:
    """Quantization and selection draw from the run's name: renaming a key must not change their results."""
    settings = (
        "aggregation=fedit adapter.shared.lr_schedule=cosine robust.rules=[norm_bound,trimmed_mean] selection=eafl "
        "cohort.size=4 fleet=week compression.upload=int8 private_eval.interval=2 trainer.compile=true"
    )
    # Computed by commit 0741131 for the same settings, `strategy.robust=[norm,trimmed] selection=energy …`.
    assert run_dir.config_hash(compose(settings)) == "af66e5cde2f18920cf431859c45d8ebf7d79fd932de9544a6341b2289e1bfe50"
