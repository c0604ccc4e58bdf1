"""Output folders: resumed with the same settings, base, data and pictures, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from common.errors import AntherError
from conf.compose import compose
from models.base.base import Base
from privacy.storage import FileStorage
from simulations import run_dir
from simulations.fleet.participants import own_pictures_hash, participants
from tests.helpers.simulations import own_pictures

FRESH, RESUMED = compose("data.writers=0 data.pictures=[x]"), compose("data.writers=0 data.pictures=[x] resume=true")
ASSETS = {"base": "b", "data": "d"}
EVERY_RENAMED_KEY = (
    "data.label_skew=true base.gradient_checkpointing=block base.compute_dtype=bf16 aggregation.max_rank=7 "
    "aggregation.energy_fraction=0.5 aggregation.weighting=rank_slice planning.metered_rank=3 planning.deadline=3 "
    "planning.name=device planning.max_joules=5 planning.max_battery_fraction=0.1 compression.upload=int4 "
    "compression.keep_fraction=0.5 compression.metered_upload=int4 compression.download=fp16 "
    "adapter.shared.lr_schedule=cosine drift_correction=scaffold server_optimizer.name=fedadam "
    "server_optimizer.lr=0.1 server_optimizer.momentum=0.5 server_optimizer.beta2=0.4 server_optimizer.tau=0.1 "
    "robust.rules=[replay,norm_bound,krum,geometric_median,trimmed_mean] robust.outlier_fraction=0.1 "
    "robust.norm_bound=2 robust.norm_factor=3 round_loop.mode=async round_loop.buffer_size=3 "
    "round_loop.concurrency=4 round_loop.quorum=2 round_loop.timeout=7 fleet=week cohort.size=3 cohort.eval_size=2 "
    "cohort.overselection=1.5 cohort.max_state_age=3 cohort.eligibility.idle=true "
    "cohort.eligibility.min_battery=0.3 cohort.eligibility.cool=true cohort.eligibility.unmetered=true "
    "cohort.eligibility.min_memory_gib=2 cohort.eligibility.has_pictures=true fleet.timezone_spread=2 "
    "fleet.schedule_jitter=3 fleet.workload.memory_factor=2 fleet.workload.compute_factor=3 selection=energy_delay "
    "selection.utility_weight=0.3 selection.candidate_factor=3 selection.oort.exploration_decay=0.9 "
    "selection.oort.min_exploration=0.2 selection.oort.clip_quantile=0.8 selection.oort.duration_quantile=0.5 "
    "selection.oort.pacer_window=3 selection.oort.pacer_step=0.1 selection.oort.max_selections=4 "
    "trainer.memory_gib=3 trainer.compile=true privacy.clip_norm=0.1 privacy.noise_multiplicity=2 "
    "privacy.device.clip_norm=2 privacy.device.target_quantile=0.4 privacy.device.clip_norm_lr=0.1 "
    "privacy.device.max_participations=3 private_eval.interval=2 private_eval.noise_multiplier=3 "
    "private_eval.clip=0.2 adapter.lora_xs_bases=x adapter.shared.lr=0.1 adapter.shared.optimizer=sgd "
    "adapter.shared.proximal_mu=0.3 adapter.personal.lr=0.3 adapter.baseline_local.lr=0.4 adapter.eval_interval=3 "
    "evaluation.baseline_local=false evaluation.gallery_size=1 evaluation.sampling_steps=3 "
    "evaluation.guidance_scale=2"
)
"""A value of its own for every key that was renamed; the keys of profiles are those of fleet=week."""


def replace_one(folder: Path) -> None:
    Image.new("RGB", (40, 30), (1, 2, 3)).save(folder / "0.png")


def rename_caption(folder: Path) -> None:
    sheet = folder / "metadata.jsonl"
    sheet.write_text(sheet.read_text().replace("my picture 3", "another picture"))


@pytest.mark.integration
def test_replaced_pictures_are_refused(base: Base, tmp_path: Path) -> None:
    mine = own_pictures(tmp_path / "mine")

    def current_hash() -> str:
        config = compose(f"data.writers=1 'data.pictures=[{mine}]'")
        digest = own_pictures_hash(participants(config, base, lambda name: FileStorage(tmp_path / name)))
        assert digest is not None
        return digest

    before = current_hash()
    run_dir.claim(tmp_path / "run", FRESH, {**ASSETS, run_dir.PICTURES: before}, memory=7)
    assert run_dir.claim(tmp_path / "run", RESUMED, {**ASSETS, run_dir.PICTURES: current_hash()}, memory=9) == 7
    for change in (replace_one, rename_caption):
        shutil.rmtree(mine)
        own_pictures(mine)
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


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (EVERY_RENAMED_KEY, "d089b76622d7378c3ab49057747dff356ad276f2daa3778da4b86556feb4d15b"),
        (
            "cohort.sampling_rate=0.2 selection=power_of_choice",
            "b878f40dc267a2979cee482e7ad33cfc04c5b07b38a90760bcfe677a74625d10",
        ),
        ("cohort.size=3 selection=eafl", "e844242f50ea5b6531a5f09345538645680b8e5213ece026a65c580222f491c9"),
        ("preset=private", "ca609c4d8772b8136eadff6eb66ebb68f063bdd57e17e9bc936134520a5d941c"),
    ],
)
def test_every_renamed_key_hashes_as_before(settings: str, first: str) -> None:
    """The hashes were computed by commit 0741131 for the same settings under the former names."""
    assert run_dir.config_hash(compose(settings)) == first
