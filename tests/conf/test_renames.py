"""Former names are refused with the present one, and translated where a store holds them."""

import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import AntherError
from conf import renames
from conf.cli import hydra_application
from conf.compose import compose
from conf.explain import known_keys
from conf.renamed_keys import Renamed
from conf.renames import Renames, present_key, present_settings, present_words, refuse_renamed
from conf.schemas import node, planning
from conf.schemas.audit import AuditConfig
from conf.schemas.fleet import ProfileConfig
from conf.schemas.pretraining import TrainBaseConfig, TrainJudgeConfig
from conf.schemas.server import ServeConfig
from conf.schemas.simulation import SimulationConfig

SCHEMAS: dict[str, tuple[Renames, tuple[type, ...]]] = {
    "simulate": (renames.SIMULATE, (SimulationConfig,)),
    "serve": (renames.SERVE, (ServeConfig, SimulationConfig)),  # a key of simulations is refused by its present name
    "node": (renames.NODE, (node.NodeConfig,)),
    "plan": (renames.PLAN, (planning.PlanConfig,)),
    "audit": (renames.AUDIT, (AuditConfig,)),
    "pretraining": (renames.PRETRAINING, (TrainBaseConfig, TrainJudgeConfig)),
}
NOW = {
    "aggregation.name": ["aggregation"],
    "selection.name": ["selection"],
    "planning.name": ["planning"],
    "server_optimizer.name": ["server_optimizer"],
    "round_loop.mode": ["round_loop"],
    "grid.name": ["grid"],
    "robust.rules": ["robust"],
    "robust.outlier_fraction": ["robust.krum.outlier_fraction", "robust.trimmed_mean.outlier_fraction"],
    "robust.norm_bound": ["robust.norm_bound.bound"],
    "robust.norm_factor": ["robust.norm_bound.factor"],
    **{
        f"selection.oort.{key}": [f"selection.{key}"]
        for key in (
            "exploration_decay",
            "min_exploration",
            "clip_quantile",
            "duration_quantile",
            "pacer_window",
            "pacer_step",
            "max_selections",
        )
    },
}
"""Keys that became groups, or options of one component."""
FORMER = {row.new: row.old for row in renames.SIMULATE.keys}
SERVER_OPTIMIZER, OPTIMIZER = FORMER["server_optimizer.name"], FORMER["adapter.shared.optimizer"]
ROWS = [(name, row) for name, (table, _) in SCHEMAS.items() for row in (*table.groups, *table.keys)]


@hydra_application("simulate", SimulationConfig)
def app(config: SimulationConfig) -> None:
    del config


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["app", *words])
    with pytest.raises(SystemExit) as stop:
        app()
    assert stop.value.code == 2
    return capsys.readouterr().err


def present_keys(name: str, row: Renamed) -> list[str]:
    return NOW.get(row.new, [row.new]) if name in ("simulate", "serve") else [row.new]


def example(name: str, row: Renamed) -> tuple[str, str]:
    """A former word, and the present one."""
    old, new = next(iter(row.values.items()), ("7", "7"))
    return f"{row.old}={old}", " or ".join(f"{key}={new}" for key in present_keys(name, row))


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{name}-{row.old}" for name, row in ROWS])
def test_former_key_is_refused(name: str, row: Renamed) -> None:
    former, present = example(name, row)
    for prefix in ("", "+", "++"):
        with pytest.raises(AntherError) as refused:
            refuse_renamed(["rounds=3", prefix + former], SCHEMAS[name][0])
        assert str(refused.value) == f"{former}: renamed to {present}"


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{name}-{row.old}" for name, row in ROWS])
def test_present_key_exists_and_former_does_not(name: str, row: Renamed) -> None:
    table, schemas = SCHEMAS[name]
    known = {key for schema in schemas for key in known_keys(schema)}
    known |= {f"fleet.profiles[].{key}" for key in known_keys(ProfileConfig)}
    assert known.issuperset(present_keys(name, row))
    assert row.old == row.new or row in table.groups or row.old not in known


@pytest.mark.parametrize("former", NOW)
def test_key_of_a_component_is_refused(former: str) -> None:
    present = " or ".join(f"{key}=7" for key in NOW[former])
    for table in (renames.SIMULATE, renames.SERVE):
        with pytest.raises(AntherError) as refused:
            refuse_renamed([f"{former}=7"], table)
        assert str(refused.value) == f"{former}=7: renamed to {present}"


@pytest.mark.parametrize("group", ["aggregation", "selection", "server_optimizer"])
def test_options_of_plugins_are_refused_under_options(group: str) -> None:
    with pytest.raises(AntherError) as refused:
        refuse_renamed([f"{group}.options.length=0.5"], renames.SIMULATE)
    assert str(refused.value) == f"{group}.options.length=0.5: renamed to {group}.length=0.5"


def test_present_keys_are_not_refused() -> None:
    refuse_renamed([], renames.SIMULATE)
    for table, schemas in SCHEMAS.values():
        for schema in schemas:
            keys = set(known_keys(schema)) - {"robust.norm_bound"}  # now a group
            refuse_renamed([f"{key}=1" for key in keys], table)


def test_values_of_lists_and_sweeps_are_renamed() -> None:
    with pytest.raises(AntherError, match=r"renamed to robust=\[norm_bound,afa,trimmed_mean\]$"):
        compose("strategy.robust=[norm,afa,trimmed]")
    with pytest.raises(AntherError, match=r"renamed to selection=energy_delay,oort$"):
        refuse_renamed(["selection=thrifty,oort"], renames.SIMULATE)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((f"{SERVER_OPTIMIZER}=adam",), f"{SERVER_OPTIMIZER}=adam: renamed to server_optimizer=adam"),
        (("strategy=fedit",), "strategy=fedit: renamed to aggregation=fedit"),
        (("--multirun", "strategy=exact,fedit"), "strategy=exact,fedit: renamed to aggregation=exact,fedit"),
        (("~strategy",), "strategy: renamed to aggregation"),
        (
            (f"adapter.shared={{{OPTIMIZER.rpartition('.')[2]}: sgd}}",),
            f"{OPTIMIZER}: renamed to adapter.shared.optimizer",
        ),
        (("fleet.profiles=[{share: 2}]",), "fleet.profiles[].share: renamed to fleet.profiles[].count"),
        (("adapter.sites=${strategy.energy}",), "${strategy.energy}: renamed to ${aggregation.energy_fraction}"),
        (("+strategy.nonsense=1",), "strategy: renamed to aggregation"),
        (("selection.name=thrifty",), "selection.name=thrifty: renamed to selection=energy_delay"),
        (("round_loop.mode=async",), "round_loop.mode=async: renamed to round_loop=async"),
        (("adapter.sites=${robust.norm_factor}",), "${robust.norm_factor}: renamed to ${robust.norm_bound.factor}"),
    ],
)
def test_command_line(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(monkeypatch, capsys, *words).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "preset/mine.yaml",
            "# @package _global_\nstrategy:\n  energy: 0.9\n",
            "strategy.energy=0.9: renamed to aggregation",
        ),
        ("privacy/mine.yaml", "level: example\ndraws: 4\n", "privacy.draws=4: renamed to privacy.noise_multiplicity=4"),
        (
            "preset/mine.yaml",
            "# @package _global_\ndefaults:\n  - override /strategy: fedit\n",
            "strategy=fedit: renamed",
        ),
        (
            "fleet/mine.yaml",
            "profiles:\n  - name: x\n    share: 2\n",
            "fleet.profiles[].share=2: renamed to fleet.prof",
        ),
        (
            "preset/mine.yaml",
            "# @package _global_\nrobust:\n  rules: [krum]\n  outlier_fraction: 0.3\n",
            "robust.rules=[krum]: renamed to robust=[krum]",
        ),
        ("selection/mine.yaml", "name: thrifty\n", "selection.name=thrifty: renamed to selection.name=energy_delay"),
    ],
)
def test_own_yaml(
    file: str,
    text: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(text)
    group, _, name = file.removesuffix(".yaml").partition("/")
    said = refusal(monkeypatch, capsys, "--config-dir", str(tmp_path), f"{group}={name}")
    assert said.startswith(f"error: {tmp_path / file}: {message}")
    assert said.count("\n") == 1


def test_device_and_plan_refuse_former_keys(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match=r"^guard\.battery=0\.2: renamed to throttle\.min_battery=0\.2$"):
        node.compose(["guard.battery=0.2"], tmp_path / "none")
    with pytest.raises(AntherError, match=r"^hours=3: renamed to max_hours=3$"):
        planning.compose_plan(["hours=3"], tmp_path)


def test_stored_words_are_translated() -> None:
    stored = ["strategy=fedit", "selection=thrifty", "strategy.robust=[norm]", "rounds=3", "strategy.decay=True"]
    present = present_words(stored, renames.SIMULATE)
    assert present == [
        "aggregation=fedit",
        "selection=energy_delay",
        "robust=[norm_bound]",
        "rounds=3",
        "adapter.shared.lr_schedule=cosine",
    ]
    assert present_words(present, renames.SIMULATE) == present


def test_stored_settings_are_translated() -> None:
    stored: dict[str, Any] = {
        "rounds": 3,
        "strategy": {"aggregation": "fedit", "robust": ["norm", "krum"], "decay": True, "quorum": 2},
        "cohort": {"memory_gib": 2.0},
        "fleet": {"sample": 5, "profiles": [{"name": "pi", "share": 2, "rank": None}]},
        "privacy": {"level": "none", "measuring": {"every": 0}},
        "selection": {"name": "sample"},
    }
    present = present_settings(stored, renames.SIMULATE)
    assert present == {
        "rounds": 3,
        "aggregation": {"name": "fedit"},
        "robust": {"norm_bound": {"bound": None, "factor": 1.0}, "krum": {"outlier_fraction": 0.2}},
        "adapter": {"shared": {"lr_schedule": "cosine"}},
        "round_loop": {"quorum": 2},
        "trainer": {"memory_gib": 2.0},
        "cohort": {"size": 5},
        "fleet": {"profiles": [{"name": "pi", "count": 2, "max_rank": None}]},
        "privacy": {"level": "none"},
        "private_eval": {"interval": 0},
        "selection": {"name": "random"},
    }
    assert present_settings(present, renames.SIMULATE) == present


def test_enrollment_is_translated(tmp_path: Path) -> None:
    (tmp_path / "node.conf").write_text("data=x\nguard.charging=false\nlink.address=a:1\nrank=3\n")
    config = node.compose(["worker.nice=3"], tmp_path / "node.conf")
    assert (config.throttle.require_charging, config.connection.address, config.max_rank) == (False, "a:1", 3)


def test_former_group_names_its_present_groups() -> None:
    assert present_key("privacy.measuring", renames.SIMULATE) == "private_eval"
    assert present_key("fleet.eligible", renames.SIMULATE) == "cohort.eligibility"
    assert present_key("cohort", renames.SIMULATE) is None
