"""Every mistake at the command line is one line with exit code 2, and leaves no files."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from common.errors import AntherError
from conf.cli import hydra_application
from conf.schemas import simulation
from conf.schemas.server import ServerConfig
from tests.helpers.configs import compose

APP = """
from conf.cli import hydra_application, output_dir
from conf.schemas.simulation import SimulationConfig

@hydra_application("simulate", SimulationConfig)
def main(config):
    print(config.rounds, config.privacy.level, config.fleet.profiles[0].name, output_dir())

main()
"""


@hydra_application("simulate", simulation.SimulationConfig)
def app(config: simulation.SimulationConfig) -> None:
    """Print some values of the configuration."""
    if config.seed == 13:
        raise AntherError("seed=13: unlucky")
    print(f"rounds={config.rounds} level={config.privacy.level} writers={config.data.writers}")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["app", *arguments])
    try:
        app()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


CONF = Path(simulation.__file__).parents[1]
MISTAKES = {
    "fleet=nope": "fleet=nope: no such option; fleet is one of: halves, laptops, mixed, phones, pis, ranks, "
    "ranks_halves, spread, week",
    "preset=nope": "preset=nope: no such option; preset is one of: claim, metered, people, private, quick, scale",
    "base=null": "a group takes the name of one of its options; --help lists them",
    "+preset=quick": "preset: set twice; write preset=… once, without +",
    "roundz=3": "roundz: no such key; did you mean rounds?",
    "adapter.shared.rnk=3": "adapter.shared.rnk: no such key; did you mean adapter.shared.rank?",
    "rank=3": "rank: no such key; did you mean adapter.shared.rank or adapter.personal.rank or personalization.rank?",
    "trainer.zzz=3": "trainer.zzz: no such key; known here: memory_gib, compile",
    "+adapter.rnk=3": "adapter.rnk: no such key; did you mean adapter.shared.rank or adapter.personal.rank or "
    "personalization.rank?",
    "++sede=3": "sede: no such key; did you mean seed?",
    "fleet.profiles=[{nam: a}]": "fleet.profiles: 'nam' is no key of a ProfileConfig",
    "rounds=abc": "rounds=abc: must be a whole number",
    "rounds=null": "rounds=null: must not be null",
    "privacy.epsilon=": "privacy.epsilon=: must be a number",
    "resume=perhaps": "resume=perhaps: must be true or false",
    "data.pictures=photos": "data.pictures=photos: must be a list: [a,b]",
    "adapter.shared=4": "adapter.shared=4: is a group of keys, not a value",
    "adapter.sites=[": "adapter.sites=[: can't be read as key=value; quote the value, and all of it for the shell: "
    """'adapter.sites='"'"'['"'"''""",
    "aggregation=fedavg": "aggregation=fedavg: no such option; did you mean fedit (FedAvg of the factors)?; "
    f"aggregation is one of: {', '.join(sorted(file.stem for file in (CONF / 'aggregation').glob('*.yaml')))}",
    "privacy=exampel": "privacy=exampel: no such option; did you mean example?; privacy is one of: both, device, "
    "example, none",
    "lr=1e-4": "lr: no such key; did you mean server_optimizer.lr or adapter.shared.lr or adapter.personal.lr or "
    "adapter.baseline_local.lr or personalization.lr?",
    "epochs=3": "epochs: no such key; did you mean rounds?",
    "adapter.shared.lr=inf": "adapter.shared.lr=inf: must be a finite number",
    "privacy.epsilon=inf": "privacy.epsilon=inf: must be a finite number",
    "round_loop.timeout=nan": "round_loop.timeout=nan: must be a finite number",
    "data.background=pinkish": "data.background=pinkish: must be white, black, gray or '#rrggbb'",
    "hydra.run.dir=/proc/nowhere/x": "/proc/nowhere: No such file or directory: name another file or folder",
    "adapter.sites='['": "adapter.sites=[: not a regular expression",
    "rounds=0": "rounds=0: must be 1 or more",
    "adapter.shared.rank=0": "adapter.shared.rank=0: must be 1 or more",
    "adapter.shared.proximal_mu=-1": "adapter.shared.proximal_mu=-1.0: must be 0 or more",
    "adapter.shared.optimizer=lion": "adapter.shared.optimizer=lion: must be one of: adamw, sgd",
    "server_optimizer.tau=0": "server_optimizer.tau: no option of server_optimizer=none, which has none; it belongs "
    "to server_optimizer=fedadam, server_optimizer=fedyogi",
    "robust=[krun]": "robust=[krun]: no such rule; did you mean krum?; known are afa, foolsgold, geometric_median, "
    "krum, median, norm_bound, replay, trimmed_mean",
    "adapter.personal.steps=0": "adapter.personal.steps=0: must be 1 or more",
    "cohort.size=21": "cohort.size=21: there are only 20 devices",
    "data=folder": "data.pictures[0]: needs a value",
    "~aggregation": "aggregation.name: needs a value",
    "base.path=${nowhere}": "base.path: Interpolation key 'nowhere' not found",
    "seed=13": "seed=13: unlucky",
}


REFUSED_BY_SCHEMA = (
    "rounds=0",
    "cohort.size=21",
    "adapter.sites='['",
    "adapter.shared.rank=0",
    "adapter.shared.proximal_mu=-1",
    "adapter.shared.optimizer=lion",
    "adapter.personal.steps=0",
    "data.background=pinkish",
)
"""Mistakes that need no whole command: `test_refused_run_keeps_existing_files` and others have `rounds=0`."""


@pytest.mark.parametrize("argument", REFUSED_BY_SCHEMA)
def test_mistake_is_refused_by_the_schema(argument: str) -> None:
    with pytest.raises(AntherError) as refused:
        compose([argument])
    assert str(refused.value) == MISTAKES[argument]


@pytest.mark.integration
@pytest.mark.parametrize("argument", [argument for argument in MISTAKES if argument not in REFUSED_BY_SCHEMA])
def test_mistake_is_one_line(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, argument) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {MISTAKES[argument]}\n"
    assert printed.out == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.integration
def test_refused_run_keeps_existing_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    assert run(monkeypatch, "hydra.run.dir=mine", "rounds=0") == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"
    assert run(monkeypatch, "hydra.run.dir=other", "rounds=0") == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.integration
def test_bad_job_stops_multirun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--multirun", "rounds=1,0,2") == 2
    printed = capsys.readouterr()
    assert printed.out == "rounds=1 level=none writers=20\n"
    assert printed.err == "error: rounds=0: must be 1 or more\n"


@pytest.mark.integration
def test_multirun_runs_every_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--multirun", "rounds=1,2", "privacy=none,example") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert run(monkeypatch, "hydra.mode=MULTIRUN", "rounds=1,2") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.integration
def test_command_line_overrides_preset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "preset=private", "data.writers=3") == 0
    assert run(monkeypatch, "preset=private", "privacy=none") == 0
    assert capsys.readouterr().out == "rounds=25 level=example writers=3\nrounds=25 level=none writers=20\n"


def test_broken_own_yaml_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "own" / "fleet").mkdir(parents=True)
    (tmp_path / "own" / "fleet" / "broken.yaml").write_text("profiles: [\n")
    assert run(monkeypatch, "--config-dir", "own", "fleet=broken") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert "broken.yaml" in printed


@pytest.mark.integration
def test_wrong_key_in_own_yaml_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "own" / "privacy").mkdir(parents=True)
    (tmp_path / "own" / "privacy" / "mine.yaml").write_text("level: example\nepsilonn: 3\n")
    assert run(monkeypatch, "--config-dir", "own", "privacy=mine") == 2
    assert capsys.readouterr().err == "error: privacy.epsilonn: no such key; did you mean privacy.epsilon?\n"


@pytest.mark.integration
def test_program(tmp_path: Path) -> None:
    """In a new interpreter, in another folder: --cfg job, a one-line error, and --help."""
    (tmp_path / "app.py").write_text(APP)
    root = Path(__file__).parents[2]

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "app.py", *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=False,
        )

    shown = program("--cfg", "job", "preset=metered")
    assert shown.returncode == 0
    assert "rounds: 8" in shown.stdout
    assert "pixel8" in shown.stdout
    refused = program("rounds=abc")
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        2,
        "",
        "error: rounds=abc: must be a whole number\n",
    )
    helped = program("--help")
    assert helped.returncode == 0
    assert "preset: claim, metered, people, private, quick, scale" in helped.stdout
    assert helped.stdout.count("  anther simulate ") == 11  # the usage line and ten examples


@pytest.mark.integration
def test_server_help_lists_its_keys():
    found = subprocess.run(
        [sys.executable, "-m", "server.supervisor.run", "--help"],
        cwd=Path(simulation.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "anther serve [group=option ...] [key=value ...]" in found
    for field in fields(ServerConfig):
        if is_dataclass(field.default_factory):
            continue
        assert re.search(rf"^ *server\.{field.name}=\S+ +\w", found, re.MULTILINE), field.name
    assert "data.writers" not in found
