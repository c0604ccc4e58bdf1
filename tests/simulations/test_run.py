"""Whole runs on a tiny base from the command line: exit codes and files.

Runs that are killed or interrupted are forks, and only the command that continues one gets a process of its own: its
imports take longer than the run.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from common.errors import AntherError
from simulations.checks import check_time
from tests.helpers.configs import compose
from tests.helpers.simulations import BARE, interrupt, own_pictures, results, run, start


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))


@pytest.mark.integration
def test_run_writes_all_results(finished: Path) -> None:
    folder = finished / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["rounds"], summary["clients"], summary["seed"], summary["epsilon"]) == (3, 3, 0, None)
    for key in ("loss", "legibility", "style"):
        assert list(summary[key]) == ["base", "local", "shared", "personal"]
        assert all(value >= 0 for value in summary[key].values())
    assert summary["bytes"]["up"] > 0
    assert summary["bytes"]["down"] > 0
    assert summary["peak_rss_mib"] > 100
    assert len(summary["config_hash"]) == 64
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    assert len(list((folder / "adapters" / "personal").glob("*.with_shared.safetensors"))) == 3
    assert list((folder / "tensorboard").glob("events*"))
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "https://" not in page
    assert "round 3 of 3" in (finished / "stdout").read_text()


@pytest.mark.integration
def test_personal_adapter_loads_in_diffusers(finished: Path, pipeline_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    file = next((finished / "run" / "adapters" / "personal").glob("*.with_shared.safetensors"))
    pipe.load_lora_weights(file)
    assert pipe.get_active_adapters()


@pytest.mark.integration
@pytest.mark.parametrize(
    "phase",
    ["round 1 of 3", *(pytest.param(one, marks=pytest.mark.stress) for one in ("personalizing", "local baselines"))],
)
def test_killed_and_resumed_run_gives_same_results(
    finished: Path, pipeline_folder: Path, tmp_path: Path, phase: str
) -> None:
    folder = tmp_path / "killed"
    code, _, errors = interrupt(pipeline_folder, folder, line=phase, number=signal.SIGKILL)
    assert code == -signal.SIGKILL, errors
    assert not (folder / "summary.json").exists()
    assert run(pipeline_folder, folder, "resume=true").returncode == 0
    assert results(folder) == results(finished / "run")


@pytest.mark.integration
def test_interrupted_run_prints_resume_command(finished: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    """The printed command gives the results of a run that was not interrupted."""
    folder = tmp_path / "my run"
    code, said, errors = interrupt(pipeline_folder, folder, line="round 1 of 3", number=signal.SIGINT)
    assert code == 130, errors
    assert "Traceback" not in errors
    (printed,) = (line for line in said.splitlines() if "resume=true" in line)
    python, *words = shlex.split(printed[printed.index("python") :])
    with start(words) as again:
        output, errors = again.communicate()
    assert (python, again.returncode) == ("python", 0), errors
    assert "round 3 of 3" in output
    assert results(folder) == results(finished / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "cohort.size=2 cohort.overselection=1.5",
            "cohort.overselection=1.5 requires a fleet with timed=true, .*arrive at once",
        ),
        (
            "round_loop=async",
            "round_loop=async requires a fleet with timed=true",
        ),
        ("round_loop.quorum=4 data.writers=3", "round_loop.quorum=4: there are 3 devices"),
        (
            "cohort.eligibility.min_battery=0.4",
            "cohort.eligibility.min_battery=0.4 requires .*fleet=week: devices of this fleet have no battery",
        ),
        ("cohort.eligibility.idle=true", "cohort.eligibility.idle=true requires a fleet with timed=true"),
        ("cohort.eligibility.cool=true", "cohort.eligibility.cool=true requires a fleet with timed=true"),
        ("planning.max_battery_fraction=0.1", "planning.max_battery_fraction=0.1 requires a fleet with timed=true"),
        ("fleet.timezone_spread=3", "fleet.timezone_spread=3 requires a fleet with timed=true"),
        ("fleet.schedule_jitter=2", "fleet.schedule_jitter=2 requires a fleet with timed=true"),
    ],
)
def test_untimed_fleet_refuses_timed_settings(overrides: str, message: str) -> None:
    with pytest.raises(AntherError, match=message):
        check_time(compose(overrides))


@pytest.mark.integration
def test_workload_without_predictions_is_refused() -> None:
    workload = "fleet.workload.memory_factor=9"
    with pytest.raises(AntherError, match=r"^fleet\.workload: only used by a fleet with timed=true, and by planning"):
        check_time(compose(workload))
    check_time(compose(f"{workload} planning=device"))
    check_time(compose(f"{workload} fleet=week"))


@pytest.mark.parametrize(
    "timed",
    [
        "cohort.overselection=2 cohort.size=2",
        "round_loop=async round_loop.quorum=9",
        "cohort.eligibility.min_battery=0.4 cohort.eligibility.idle=true planning.max_battery_fraction=0.1",
    ],
)
def test_timed_fleet_accepts_timed_settings(timed: str) -> None:
    check_time(compose(f"fleet=week {timed} data.writers=3"))


@pytest.mark.integration
class TestRefusedRuns:
    """Refused runs print one line, exit with 2 and overwrite nothing."""

    def refuse(self, done: subprocess.CompletedProcess[str], *words: str) -> None:
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, done.stderr
        assert all(word in lines[0] for word in words), lines[0]

    def test_folder_with_other_files(self, pipeline_folder: Path, tmp_path: Path) -> None:
        folder = tmp_path / "work"
        folder.mkdir()
        (folder / "thesis.tex").write_text("mine")
        self.refuse(run(pipeline_folder, folder), "already holds files", "hydra.run.dir")
        assert [path.name for path in folder.iterdir()] == ["thesis.tex"]

    def test_folder_of_another_run(self, finished: Path, pipeline_folder: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(finished / "run", tmp_path / "copy"))
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.refuse(run(pipeline_folder, folder, "seed=1", "resume=true"), "different run", "seed was 0, now 1")
        self.refuse(run(pipeline_folder, folder), "already holds a run", "resume=true")
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def test_no_run_to_resume(self, pipeline_folder: Path, tmp_path: Path) -> None:
        self.refuse(run(pipeline_folder, tmp_path / "new", "resume=true"), "no run to resume")

    def test_truncated_checkpoint(self, finished: Path, pipeline_folder: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(finished / "run", tmp_path / "copy"))
        (folder / "summary.json").unlink()
        adapter = folder / "checkpoints" / "round-000003" / "adapter.safetensors"
        adapter.write_bytes(adapter.read_bytes()[:-1])
        self.refuse(run(pipeline_folder, folder, "resume=true"), "round-000003", "delete")

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("ronds=3", ("ronds", "rounds")),
            ("adapter.shared.rank=0", ("adapter.shared.rank=0",)),
            ("base.path=/nowhere", ("/nowhere", "no such folder")),
            ("data.pictures=[/nowhere]", ("/nowhere", "no such folder")),
            ("aggregation.max_rank=2", ("aggregation.max_rank=2",)),
        ],
    )
    def test_invalid_settings(
        self, pipeline_folder: Path, tmp_path: Path, override: str, words: tuple[str, ...]
    ) -> None:
        self.refuse(run(pipeline_folder, tmp_path / "new", override), *words)
        assert not (tmp_path / "new" / "run.json").exists()


@pytest.mark.integration
def test_own_folder_replaces_a_writer(pipeline_folder: Path, tmp_path: Path) -> None:
    mine = own_pictures(tmp_path / "My cat!")
    few = "rounds=1", "evaluation.gallery_size=0"
    done = run(pipeline_folder, tmp_path / "run", f"data.pictures=['{mine}']", *few)
    assert done.returncode == 0, done.stderr
    people = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert len(people) == 3
    (own,) = [person for person in people if person["kind"] == "own"]
    assert own["name"] == "my-cat"
    assert own["personal"]["legibility"] is None
    assert (tmp_path / "run" / "adapters" / "personal" / "my-cat.with_shared.safetensors").exists()


@pytest.mark.integration
def test_private_run_reports_its_guarantee(pipeline_folder: Path, tmp_path: Path) -> None:
    measuring = ["private_eval.interval=3", "private_eval.noise_multiplier=5"]
    done = run(pipeline_folder, tmp_path / "run", "privacy=example", "privacy.epsilon=4", *measuring, *BARE)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all((row["base"], row["shared"]) == (None, None) for row in rounds)  # as on real devices, no loss is sent
    assert [row["gain"] is None for row in rounds] == [True, True, True, False]
    assert rounds[3]["gain_error"] == pytest.approx(5 * 0.1 / (2 * 3**0.5))
    assert "by its noise" in done.stdout
    assert "± " in (tmp_path / "run" / "report.html").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 3.9 < summary["epsilon"].pop("value") <= 4 < summary["epsilon"].pop("strict")
    assert summary["epsilon"] == {"delta": 1e-3, "unit": "image", "relation": "add_or_remove_one", "seen": None}
    assert summary["device_epsilon"] is None
    assert summary["best_round"] == 3  # fixed in advance: selecting it would use the pictures


@pytest.mark.integration
def test_run_with_both_guarantees(pipeline_folder: Path, tmp_path: Path) -> None:
    chosen = [
        "privacy=both",
        "privacy.epsilon=4",
        "privacy.device.epsilon=6",
        "aggregation=fedit",
        "cohort.sampling_rate=0.7",
    ]
    done = run(pipeline_folder, tmp_path / "run", *chosen, *BARE)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 3.9 < summary["epsilon"].pop("value") <= 4 < summary["epsilon"].pop("strict")
    assert summary["epsilon"] == {"delta": 1e-3, "unit": "image", "relation": "add_or_remove_one", "seen": None}
    device = summary["device_epsilon"]
    assert 5.9 < device.pop("value") <= 6 < min(device.pop("strict"), device.pop("seen"))
    assert device == {"delta": 1e-3, "unit": "device", "relation": "add_or_remove_one"}
    events = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [event["state"] for event in events] == ["reserved", "released"] * 3
    assert [event["release"] for event in events[::2]] == [False] * 3


@pytest.mark.integration
def test_serial_and_cohort_give_same_results(finished: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    assert run(pipeline_folder, tmp_path / "run", "grid=serial", "evaluation.gallery_size=0").returncode == 0
    one, two = (results(folder)[0]["loss"] for folder in (finished / "run", tmp_path / "run"))
    for arm, loss in one.items():
        assert two[arm] == pytest.approx(loss, rel=1e-4)
