"""The audit command: attacks on finished runs, page and JSON, exit codes, one-line errors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import atomic_files
from common.errors import AntherError
from conf.schemas.audit import AuditConfig, MembershipConfig
from models.base.base import Base
from models.lora.adapter import Adapter
from privacy.accounting import Guarantee, PoissonGaussian
from privacy.audit.empirical import AuditResult, Guesses
from privacy.audit.membership import Interval, judge, roc
from server.rounds import checkpoint
from server.rounds.state import RunState
from simulations import run_dir
from simulations.audit import canaries, membership, plots, run
from simulations.audit import page as audit_page
from simulations.audit.membership import CONTROL, candidates
from simulations.audit.verdicts import AuditResults, ClaimResult
from simulations.fleet.writers import writers
from tests.helpers.broken_mechanisms import ScaledNoise
from tests.helpers.configs import compose
from tests.helpers.people import characters, write
from tests.helpers.reference_trainer import nonzero_adapter
from tests.privacy.audit.test_membership import trial
from tests.server.rounds.test_checkpoint import device, round_
from typefaces.dataset import GLYPHS, POOL, TEST

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTHER_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def finish(base: Base, folder: Path, *overrides: str, adapter: Adapter) -> Path:
    """Write a finished run of three writers with this shared adapter; the last writer was never asked."""
    config = compose(" ".join([f"base.path={base.folder} data.writers=3 data.train=20 base.device=cpu", *overrides]))
    run_dir.claim(folder, config, {"base": base.hash, "data": "known"}, memory=1)
    private = config.privacy.of_examples
    guarantee = dataclasses.asdict(Guarantee(8.0, 1e-3)) if private else None
    atomic_files.write(folder / "summary.json", json.dumps({"epsilon": guarantee}).encode())
    participated = {writer.name: device() for writer in writers(config.data)[:2]}
    state = RunState.start(run="run", private=private, adapter=adapter)
    state = state.after(round_(0, None), adapter).after(round_(1, 0.5), adapter)
    checkpoint.save(folder / "checkpoints", dataclasses.replace(state, devices=participated))
    return folder


@pytest.fixture(scope="module")
def runs(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Create two runs that differ only in their seed, and a private one."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"open": "seed=0", "again": "seed=1", "private": "privacy=example"}
    return [
        finish(base, folder / name, override, adapter=nonzero_adapter(base, 2, seed))
        for seed, (name, override) in enumerate(kinds.items())
    ]


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """Run the command line and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["audit", *arguments, f"hydra.run.dir={folder}"])
    with pytest.raises(SystemExit) as stop:
        run.main()
    return int(stop.value.code or 0)


@pytest.mark.integration
def test_finished_runs_yield_page_and_numbers(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = f"runs=[{','.join(map(str, runs))}]"
    assert command(monkeypatch, tmp_path, listed, "membership.timesteps=1", "membership.bootstrap_samples=100") == 0
    groups = {group["arm"]: group for group in json.loads((tmp_path / "audit.json").read_text())["membership"]}
    assert {name: len(group["runs"]) for name, group in groups.items()} == {
        "no differential privacy, 4 rounds of 4 steps": 2,
        "ε=8 per image (δ=0.001, add or remove one), 4 rounds of 4 steps": 1,
    }
    for group in groups.values():
        count = len(group["runs"])
        assert group["writers"] == 3
        for attack in group["attacks"].values():
            assert attack["members"] == 2 * 20 * count
            assert attack["others"] == (3 * (POOL + TEST) - 2 * 20) * count
            assert attack["auc"]["low"] <= attack["auc"]["value"] <= attack["auc"]["high"]
            assert attack["roc"]["tpr"][-1] == attack["roc"]["fpr"][-1] == 1.0
    one, other = (group["attacks"][CONTROL]["auc"]["value"] for group in groups.values())
    assert one == pytest.approx(other)  # same pictures, same base: independent of the training
    page = (tmp_path / "audit.html").read_text()
    assert "Who was trained on?" in page
    assert all(name in page for name in groups)
    assert "loss against the base    AUC" in capsys.readouterr().out
    check_page(page)


@pytest.mark.integration
def test_last_adapter_can_be_attacked(base: Base, tmp_path: Path) -> None:
    folder = finish(base, tmp_path / "run", adapter=nonzero_adapter(base, 2, 0))
    state = checkpoint.load(folder / "checkpoints", sites=base.sites)
    assert state is not None
    last = state.after(round_(2, 0.9), nonzero_adapter(base, 2, 1))
    assert (last.best_adapter is last.adapter) is False
    checkpoint.save(folder / "checkpoints", last)

    def mean_score(*overrides: str) -> float:
        config = MembershipConfig(timesteps=1, bootstrap_samples=100, **dict(pair.split("=") for pair in overrides))
        group = membership.attack([membership.load(folder)], config, confidence=0.95, seed=0)
        return float(group.trials["loss"].scores.mean())

    best = mean_score()
    assert mean_score("adapter=best") == best != mean_score("adapter=last")


def test_run_on_another_base_is_refused(base: Base, runs: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0], tmp_path / "moved")
    record = json.loads((folder / "run.json").read_text())
    record["assets"]["base"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(AntherError, match="trained on another base"):
        membership.attack([membership.load(folder)], AuditConfig().membership, confidence=0.95, seed=0)
    shutil.rmtree(folder / "checkpoints")
    record["assets"]["base"] = base.hash
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(AntherError, match="its checkpoints, with the adapter to attack, are missing"):
        membership.attack([membership.load(folder)], AuditConfig().membership, confidence=0.95, seed=0)


@pytest.mark.stress
def test_run_on_shipped_base_is_attacked(tmp_path: Path) -> None:
    """Run a real federation, then the audit of its results."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    few = ["rounds=2", "data.writers=4", "data.train=10", "evaluation.gallery_size=0", "evaluation.devices=1"]
    short = ["adapter.shared.steps=2", "adapter.personal.steps=2", "tracker=none"]
    for module, *arguments in (
        ("simulations.run", *few, *short, f"hydra.run.dir={tmp_path / 'run'}"),
        ("simulations.audit.run", f"runs=[{tmp_path / 'run'}]", f"hydra.run.dir={tmp_path / 'audit'}"),
    ):
        call = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "[transformers]" not in done.stderr  # warnings about optional packages
    (group,) = json.loads((tmp_path / "audit" / "audit.json").read_text())["membership"]
    assert group["attacks"][CONTROL]["members"] == 40
    check_page((tmp_path / "audit" / "audit.html").read_text())


@pytest.mark.parametrize(
    ("started", "prefix"),
    [("anther audit", ["anther", "audit"]), ("/x/run.py", ["python", "-m", "simulations.audit.run"])],
)
def test_page_names_the_command_that_started_the_audit(
    started: str, prefix: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hydra = SimpleNamespace(overrides=SimpleNamespace(task=["canaries.count=40"]))
    monkeypatch.setattr(run.HydraConfig, "get", lambda: hydra)
    monkeypatch.setattr(sys, "argv", [started])
    assert run.command() == [*prefix, "canaries.count=40"]


def check_page(page: str) -> None:
    """Check that the page loads nothing and shows no missing value."""
    assert not re.search(r"""(?:src|href)=["']?https?:|<script|@import|url\(""", page)
    HTMLParser().feed(page)
    assert "None" not in page
    assert "nan" not in page.lower().replace("nanum", "")


@pytest.mark.integration
def test_folder_without_finished_run_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="no finished run here"):
        membership.load(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(AntherError, match="damaged"):
        membership.load(tmp_path)
    first, same, private = (membership.load(folder).group_key for folder in runs)
    assert first == same != private


@pytest.mark.integration
def test_members_are_pictures_of_participants() -> None:
    data = compose("data.writers=3 data.devices=5 data.train=6").data
    writer, *_ = names = sorted({candidate.writer for candidate in candidates(data, set())})
    assert not any(candidate.member for candidate in candidates(data, set()))
    one = [candidate for candidate in candidates(data, {writer}) if candidate.member]
    assert {candidate.writer for candidate in one} == {writer}
    assert len(one) == 6
    both = [candidate for candidate in candidates(data, {writer, f"{writer}-0002"}) if candidate.member]
    assert len({candidate.letter for candidate in both}) == len(both) >= 6
    assert Counter(candidate.writer for candidate in candidates(data, set())) == dict.fromkeys(names, POOL + TEST)


def test_candidates_of_people(tmp_path: Path) -> None:
    """Newcomers' pictures are none: their adapters never left them."""
    file = write(tmp_path / "people.parquet", characters(["ann", "bo", "cy"], GLYPHS[:20]))
    sizes = "data.train=4 data.test=3 data.validation=2"
    data = compose(f"data.path={file} data.people=2 data.newcomers=[cy] {sizes}").data
    everyone = candidates(data, {"ann"})
    assert Counter((candidate.writer, candidate.member) for candidate in everyone) == {
        ("ann", True): 4,
        ("ann", False): 3,
        ("bo", False): 7,
    }
    assert all(candidate.letter == candidate.picture.caption for candidate in everyone)


def test_validation_pictures_are_no_candidates() -> None:
    """They selected the best round."""
    data = compose("data.writers=2 data.train=5 data.validation=10").data
    known = {(candidate.writer, candidate.letter) for candidate in candidates(data, set())}
    for writer in writers(data):
        assert not known & {(writer.name, picture.caption) for picture in writer.pictures.validation}


@pytest.mark.integration
def test_matching_hides_letter_frequencies() -> None:
    """The first five glyphs of a writer are mostly lowercase: an attack on the letter only is well above 0.5."""
    data = compose("data.role=test data.writers=200 data.train=5").data
    everyone = candidates(data, {candidate.writer for candidate in candidates(data, set())})
    scores = [float(candidate.letter.startswith("lowercase")) for candidate in everyone]
    members = [candidate.member for candidate in everyone]
    _, letters = np.unique([candidate.letter for candidate in everyone], return_inverse=True)
    assert roc(trial(scores, members)).auc > 0.6
    assert roc(trial(scores, members, None, letters)).auc == pytest.approx(0.5)


def finding(bound: float, claimed: float = 1.0) -> AuditResult:
    claim = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.5, steps=3)
    return AuditResult(
        claim=claim,
        claimed=Guarantee(claimed, 1e-5),
        refuted=bound > claimed,
        independent=bound,
        one_run=bound / 2,
        f_dp=bound,
        noise_multiplier=1.0,
        ceiling=7.0,
        attack="own releases",
        guesses=Guesses(100, 50, 30),
    )


def claim(bound: float, *, honest: bool = True) -> ClaimResult:
    return ClaimResult("ε = 1" if honest else "ε = 1, noise left out", finding(bound), honest)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("claims", "sound"),
    [
        ([claim(0.5), claim(5.0, honest=False)], True),
        ([claim(1.5), claim(5.0, honest=False)], False),
        ([claim(0.5), claim(0.9, honest=False)], False),
    ],
)
def test_refuted_claim_or_undetected_missing_noise_fails(
    claims: list[ClaimResult], sound: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "audit_training_loop", lambda _: iter(claims))
    monkeypatch.setattr(run, "audit_devices", lambda _: iter([]))
    monkeypatch.setattr(run, "noise_tests", lambda _: iter([]))
    assert command(monkeypatch, tmp_path) == (0 if sound else 1)
    assert json.loads((tmp_path / "audit.json").read_text())["sound"] is sound
    page = (tmp_path / "audit.html").read_text()
    assert ("No claim was refuted" in page) is sound
    check_page(page)


@pytest.mark.integration
def test_loop_is_sound_and_missing_noise_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AuditConfig()
    config.canaries.epsilons, config.canaries.rounds, config.canaries.count = [1.0], 4, 1000
    config.canaries.noise = "simulated"
    config.clients.count = config.noise_tests.max_length = 0
    config.noise_tests.base = None
    lines: list[str] = []
    results = run.audit(config, lines.append)
    assert results.sound
    assert [line[:4] for line in lines] == ["ok  "] * 3
    assert ["not refuted" in lines[0], "noise of ε = 1" in lines[1], "not refuted" in lines[2]] == [True, True, False]
    honest = run.noise_source
    monkeypatch.setattr(run, "noise_source", lambda *key: canaries.ZeroNoise(honest(*key)))
    assert not run.audit(config, lines.append).sound


@pytest.mark.stress
@pytest.mark.parametrize("scale", [1.0, 0.7, 0.5])
def test_too_little_noise_fails_the_audit(
    scale: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With half the noise, claims are refuted too. Takes a minute for each scale."""
    honest = run.noise_source
    monkeypatch.setattr(run, "noise_source", lambda *key: ScaledNoise(honest(*key), scale))
    assert command(monkeypatch, tmp_path, "canaries.epsilons=[4]", "clients.epsilons=[4]") == (0 if scale == 1 else 1)
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    situations = [line for line in failed if " noise values" in line]
    claims = [line for line in failed if ": refuted" in line]
    assert len(situations) == (0 if scale == 1 else 10)
    assert len(claims) == (2 if scale == 0.5 else 0) or scale == 0.7
    assert lines[-2].startswith("ok" if scale == 1 else "FAIL")
    assert "is detected with probability 0.999" in lines[-2]
    check_page((tmp_path / "audit.html").read_text())


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("runs=[nowhere]", "nowhere: no finished run here"),
        ("canaries.count=0 clients.count=0 noise_tests.max_length=0", "nothing to audit"),
        ("canaries.epsilons=[]", "canaries.epsilons=[]: name a claim"),
        ("canaries.noise=none", "canaries.noise=none: must be one of: secure, simulated"),
        ("clients.dimension=100", "clients.dimension=100: must be clients.count or more"),
        ("membership.adapter=first", "membership.adapter=first: must be one of: best, last"),
        ("membership.timestep_fraction=1", "membership.timestep_fraction=1.0: must lie between 0 and 1"),
        ("noise_tests.max_length=10", "noise_tests.max_length=10: must be 0, or 1024 or more"),
        ("false_alarm_rate=0.5", "false_alarm_rate=0.5: must be over 0, at most 0.05"),
        ("confidence=0.3", "confidence=0.3: must lie between"),
        ("canary.count=9", "no such key; did you mean"),
    ],
)
def test_invalid_setting_is_one_line(
    mistake: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert command(monkeypatch, tmp_path / "audit", *mistake.split()) == 2
    errors = capsys.readouterr().err.strip()
    assert "\n" not in errors
    assert words in errors
    assert not (tmp_path / "audit").exists()


def test_plots_show_their_values() -> None:
    row = ("loss", Interval(0.7, 0.65, 0.75), "shared")
    assert "0.700 ± 0.050" in plots.intervals([row], chance=0.5, low=0.4, high=0.8)
    result = judge(trial(np.arange(40.0), np.arange(40) % 3 == 0, np.arange(40) % 8), resamples=100)
    assert audit_page.thin(result.roc) is result.roc
    many = trial(np.random.default_rng(0).normal(size=3000), np.arange(3000) % 2 == 0)
    whole = roc(many)
    thinned = audit_page.thin(whole)
    assert len(thinned.fpr) <= 510
    assert thinned.auc == pytest.approx(whole.auc, abs=2e-3)
    assert AuditResults().sound
