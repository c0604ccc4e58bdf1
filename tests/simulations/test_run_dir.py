"""Output folders: resumed with the same settings, base, data and pictures, or refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from common.errors import AntherError
from conf.compose import compose
from conf.schemas.simulation import SimulationConfig
from models.base.base import Base
from privacy.storage import FileStorage
from simulations import run_dir
from simulations.fleet.participants import own_pictures_hash, participants
from tests.helpers import configs
from tests.helpers.simulations import own_pictures

ASSETS = {"base": "b", "data": "d"}
DRAWN = (  # defaults of that time
    "evaluation.sampler=ddim evaluation.sampling_steps=6 evaluation.guidance_scale=1.5 evaluation.guide_strength=1"
)
HASHES = [
    (
        "587609844fc13b9e62cea62d44d28e6b5fd2ab879fbbdb1e8f503c50b114b938",
        "aggregation=exact aggregation.max_rank=7 aggregation.energy_fraction=0.5 aggregation.weighting=rank_slice",
    ),
    (
        "d1d07f0f8d85fdac83516c8e19e4337a5e7592cf6021350a333f3fb81a8834bb",
        "aggregation=exact aggregation.max_rank=null",
    ),
    (
        "e4cea6435dd6c72d80bcaae76edb121c7b66312a1be483220e67bb2c1e2d4344",
        "aggregation=fedit server_optimizer=fedadam server_optimizer.lr=0.1 server_optimizer.momentum=0.5 "
        "server_optimizer.beta2=0.4 server_optimizer.tau=0.1",
    ),
    (
        "40a10762283f50bf35d3e7fc81a162a76f898a0c280b45d0e3f89de96b4772c2",
        "aggregation=fedit server_optimizer=fedavgm",
    ),
    (
        "9d4a737165b6e9ff9cc01a996e2dab21e6579cbc45e7d8736096e29d02f350d2",
        "aggregation=fedit server_optimizer=fedyogi server_optimizer.tau=0.01",
    ),
    (
        "8dfa30ed446ad985c782a40d6d74b914b43136b50c1ad715da5f08fa726f9774",
        "selection=energy_delay cohort.size=3 selection.candidate_factor=3",
    ),
    (
        "772da482b69163951843bd62b2aab1a2f4766622788c5e85767a89b10d316392",
        "selection=eafl cohort.size=3 selection.utility_weight=0.3 selection.exploration_decay=0.9 "
        "selection.min_exploration=0.2 selection.clip_quantile=0.8 selection.duration_quantile=0.5 "
        "selection.pacer_window=3 selection.pacer_step=0.1 selection.max_selections=4",
    ),
    (
        "756aa1dfa2b8e27982c8861a569d7aaa334b631a4e53f08d804c67aaccfc8186",
        "selection=oort cohort.size=3",
    ),
    (
        "d06dcc0d8df9597a6d22e119b3b8ea92cc68bbcceca60c1eef5846e9974a70f1",
        "robust=[replay,norm_bound,krum,geometric_median,trimmed_mean] robust.krum.outlier_fraction=0.1 "
        "robust.trimmed_mean.outlier_fraction=0.1 robust.norm_bound.bound=2",
    ),
    (
        "cb8ab3da29b368060af2068165cb1e756c4626629a0995bb35ea9c2b5a2d47c3",
        "robust=[norm_bound,krum] robust.norm_bound.factor=3",
    ),
    (
        "e5f9f54c7b770d7775c66f0eda291329ba6e6162714a1c6e5e30f392cced85d4",
        "robust=[median]",
    ),
    (
        "06a7e09c662f7ff84e32607256ca21de1bf4afef10c609357309521dbff26f94",
        "fleet=week round_loop=async round_loop.buffer_size=3 round_loop.concurrency=4 round_loop.quorum=2 "
        "round_loop.timeout=7",
    ),
    (
        "13dbfee047b9c57c65fa280fec137f0136ccbbf5c9b096ded44c313200e2a7a9",
        "fleet=week round_loop=async",
    ),
    (
        "c948c18cae12d39d358e8e786c074c4baace85c6bce538160ddf78b2720bbe28",
        "planning=device planning.metered_rank=3 planning.deadline=3 planning.max_joules=5 "
        "planning.max_battery_fraction=0.1",
    ),
    (
        "d50ecb9ca4ae03bb1d24081ec23c5575afa318ba9f34871445010cc0cb5abd8f",
        "compression.upload=int4 compression.keep_fraction=0.5 compression.metered_upload=int4 "
        "compression.download=fp16",
    ),
    (
        "2dee5d4728f16f4e4d9818616a37363c0095bbce14781d0a4c37df3c6ac05e28",
        "data.label_skew=true base.gradient_checkpointing=block base.compute_dtype=bf16 "
        "adapter.shared.lr_schedule=cosine drift_correction=scaffold fleet=week cohort.size=3 "
        "cohort.eval_size=2 cohort.overselection=1.5 cohort.max_state_age=3 cohort.eligibility.idle=true "
        "cohort.eligibility.min_battery=0.3 cohort.eligibility.cool=true cohort.eligibility.unmetered=true "
        "cohort.eligibility.min_memory_gib=2 cohort.eligibility.has_pictures=true fleet.timezone_spread=2 "
        "fleet.schedule_jitter=3 fleet.workload.memory_factor=2 fleet.workload.compute_factor=3 "
        "trainer.memory_gib=3 trainer.compile=true privacy.clip_norm=0.1 privacy.noise_multiplicity=2 "
        "privacy.device.clip_norm=2 privacy.device.target_quantile=0.4 privacy.device.clip_norm_lr=0.1 "
        "privacy.device.max_participations=3 private_eval.interval=2 private_eval.noise_multiplier=3 "
        "private_eval.clip=0.2 adapter.lora_xs_bases=x adapter.shared.lr=0.1 adapter.shared.optimizer=sgd "
        "adapter.shared.proximal_mu=0.3 adapter.personal.lr=0.3 adapter.baseline_local.lr=0.4 "
        "adapter.eval_interval=3 evaluation.baseline_local=false evaluation.gallery_size=1 "
        "evaluation.sampling_steps=3 evaluation.guidance_scale=2",
    ),
]
"""Hashes of commit b4ce858 for the same settings under its keys, such as `robust.rules=…` and `round_loop.mode=…`."""


def fresh(overrides: str = "") -> SimulationConfig:
    return configs.compose(f"data.writers=0 data.pictures=[x] {overrides}")


def resumed() -> SimulationConfig:
    return fresh("resume=true")


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
    run_dir.claim(tmp_path / "run", fresh(), {**ASSETS, run_dir.PICTURES: before}, memory=7)
    assert run_dir.claim(tmp_path / "run", resumed(), {**ASSETS, run_dir.PICTURES: current_hash()}, memory=9) == 7
    for change in (replace_one, rename_caption):
        shutil.rmtree(mine)
        own_pictures(mine)
        change(mine)
        with pytest.raises(AntherError, match="was run with another set of pictures"):
            run_dir.claim(tmp_path / "run", resumed(), {**ASSETS, run_dir.PICTURES: current_hash()}, memory=9)


@pytest.mark.parametrize("asset", ["base", "data"])
def test_replaced_asset_is_refused(asset: str, tmp_path: Path) -> None:
    run_dir.claim(tmp_path / "run", fresh(), ASSETS, memory=7)
    stored = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(
        AntherError, match=rf"was run with another {asset} \({ASSETS[asset]}\): restore it, or start a new"
    ):
        run_dir.claim(tmp_path / "run", resumed(), {**ASSETS, asset: "replaced"}, memory=9)
    assert (tmp_path / "run/run.json").read_bytes() == stored
    assert run_dir.claim(tmp_path / "run", resumed(), ASSETS, memory=9) == 7


@pytest.mark.integration
def test_writers_have_no_own_pictures(base: Base, tmp_path: Path) -> None:
    assert (
        own_pictures_hash(participants(compose("data.writers=2"), base, lambda name: FileStorage(tmp_path / name)))
        is None
    )


def test_older_run_is_resumed_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir.claim(tmp_path / "run", fresh(), ASSETS, memory=7)
    assert "background" not in json.loads((tmp_path / "run/run.json").read_text())["config"]["data"]
    assert run_dir.claim(tmp_path / "run", resumed(), {**ASSETS, run_dir.PICTURES: "p"}, memory=9) == 7
    assert "is unknown" in caplog.text


def test_added_setting_counts_if_set(tmp_path: Path) -> None:
    black = compose("data.writers=0 data.pictures=[x] data.background=black resume=true")
    assert run_dir.config_hash(black) != run_dir.config_hash(fresh())
    run_dir.claim(tmp_path / "run", fresh(), ASSETS, memory=7)
    with pytest.raises(AntherError, match=r"data\.background was white, now black"):
        run_dir.check(tmp_path / "run", black)


def test_other_changes_are_counted(tmp_path: Path) -> None:
    run_dir.claim(tmp_path / "run", fresh(), ASSETS, memory=7)
    changed = fresh(f"resume=true seed=9 rounds=7 {DRAWN}")
    with pytest.raises(AntherError, match=r"\(evaluation\.guidance_scale was 8\.0, now 1\.5; .*; and 3 more\): resume"):
        run_dir.check(tmp_path / "run", changed)


def test_added_settings_are_restored(tmp_path: Path) -> None:
    run_dir.claim(tmp_path / "run", fresh(), ASSETS, memory=7)
    stored = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert "personalization" not in stored
    settings = run_dir.stored_settings(stored)
    assert settings["personalization"] == {"name": "lora"}
    assert (settings["data"]["background"], settings["data"]["newcomers"]) == ("white", [])
    with pytest.raises(AntherError, match=r"\(personalization\.name was lora, now prior;"):
        run_dir.check(tmp_path / "run", fresh("resume=true personalization=prior"))


def test_hash_is_that_of_the_first_key_names() -> None:
    """Quantization and selection draw from the run's name: renaming a key must not change their results."""
    settings = (
        "aggregation=fedit adapter.shared.lr_schedule=cosine robust=[norm_bound,trimmed_mean] selection=eafl "
        "cohort.size=4 fleet=week compression.upload=int8 private_eval.interval=2 trainer.compile=true"
    )
    # Computed by commit 0741131 for the same settings, `strategy.robust=[norm,trimmed] selection=energy …`.
    hashed = run_dir.config_hash(compose(f"{DRAWN} {settings}"))
    assert hashed == "af66e5cde2f18920cf431859c45d8ebf7d79fd932de9544a6341b2289e1bfe50"


@pytest.mark.parametrize(
    ("settings", "first"),
    [
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
    assert run_dir.config_hash(compose(f"{DRAWN} {settings}")) == first


@pytest.mark.integration
@pytest.mark.parametrize(("before", "settings"), HASHES)
def test_components_hash_as_before(before: str, settings: str) -> None:
    assert run_dir.config_hash(compose(f"{DRAWN} {settings}")) == before


def test_option_with_its_default_hashes_as_before() -> None:
    """It was null."""
    given = "aggregation=fedit server_optimizer=fedadam"
    assert run_dir.config_hash(compose(f"{given} server_optimizer.lr=0.003")) == run_dir.config_hash(compose(given))


@pytest.mark.integration
def test_attention_by_name_hashes_as_null() -> None:
    named, null, linear = (compose(f"adapter.sites={sites}") for sites in ("attention", "null", "linear"))
    assert run_dir.config_hash(named) == run_dir.config_hash(null) == run_dir.config_hash(compose(""))
    assert run_dir.config_hash(linear) != run_dir.config_hash(null)
    assert (named.adapter.sites, linear.adapter.sites) == (None, "linear")


def test_order_of_robust_rules_counts(tmp_path: Path) -> None:
    words = "aggregation=fedit data.writers=0 data.pictures=[x]"
    run_dir.claim(tmp_path / "run", compose(f"{words} robust=[krum,norm_bound]"), ASSETS, memory=7)
    assert run_dir.check(tmp_path / "run", compose(f"{words} robust=[krum,norm_bound] resume=true"))
    with pytest.raises(AntherError, match=r"holds a different run \(robust has another order\)"):
        run_dir.check(tmp_path / "run", compose(f"{words} robust=[norm_bound,krum] resume=true"))


def test_run_with_an_explicit_default_is_resumed(tmp_path: Path) -> None:
    """Earlier versions gave it another hash, which is still the run's name."""
    config = compose("aggregation=fedit server_optimizer=fedadam server_optimizer.lr=0.003")
    run_dir.claim(tmp_path / "run", config, ASSETS, memory=7)
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    record["config"]["server_optimizer"] |= {"momentum": None, "beta2": None, "tau": None}
    file.write_text(json.dumps({**record, "config_hash": "earlier"}))
    assert run_dir.check(tmp_path / "run", replace(config, resume=True))["config_hash"] == "earlier"
    other = compose("aggregation=fedit server_optimizer=fedadam server_optimizer.lr=0.004 resume=true")
    with pytest.raises(AntherError, match=r"server_optimizer\.lr was 0\.003, now 0\.004"):
        run_dir.check(tmp_path / "run", other)
