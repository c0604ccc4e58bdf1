"""Every key has a meaning, and the help of its command prints it."""

import dataclasses
import re
import sys

import pytest

from anther.commands import COMMANDS
from conf.cli import hydra_application
from conf.explain import known_keys
from conf.key_help import WIDTH, field_docs, key_help
from conf.schemas.audit import AuditConfig
from conf.schemas.fleet import ProfileConfig
from conf.schemas.node import NodeConfig
from conf.schemas.planning import PlanConfig
from conf.schemas.pretraining import TrainBaseConfig, TrainJudgeConfig
from conf.schemas.server import ServeConfig
from conf.schemas.simulation import SimulationConfig
from conf.schemas.training import SharedTrainingConfig

SCHEMAS = (SimulationConfig, ServeConfig, AuditConfig, NodeConfig, PlanConfig, TrainBaseConfig, TrainJudgeConfig)


def groups(schema: type) -> list[type]:
    """A schema, and those of its groups."""
    found = [schema, ProfileConfig]
    for field in dataclasses.fields(schema):
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            found += groups(field.default_factory)
    return found


GROUPS = sorted({group for schema in SCHEMAS for group in groups(schema)}, key=lambda group: group.__name__)


@pytest.mark.parametrize("schema", GROUPS)
def test_every_field_has_a_docstring(schema: type) -> None:
    assert schema.__doc__
    assert not schema.__doc__.startswith(f"{schema.__name__}(")
    docs = field_docs(schema)
    for field in dataclasses.fields(schema):
        nested = isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory)
        assert nested or docs[field.name].endswith((".", "]")), field.name
        assert nested or "$" not in docs[field.name], field.name  # Hydra's help is a template


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_key_is_listed(schema: type) -> None:
    lines = [re.sub(r"^ {6}", "    ", line) for line in key_help(schema).splitlines()]  # options of components
    leaves = [key for key in known_keys(schema) if not any(k.startswith(f"{key}.") for k in known_keys(schema))]
    for key in leaves:
        assert any(line.startswith(f"    {key}=") for line in lines), key
    assert max(map(len, lines)) <= WIDTH + 2


def test_docstrings_of_bases_are_inherited() -> None:
    assert field_docs(SharedTrainingConfig).keys() >= {"rank", "lr", "optimizer"}


@pytest.mark.integration
def test_values_are_those_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @hydra_application("simulate", SimulationConfig)
    def app(config: SimulationConfig) -> None:
        del config

    monkeypatch.setattr(sys, "argv", ["app", "--help", "preset=private", "rounds=7"])
    with pytest.raises(SystemExit):
        app()
    helped = capsys.readouterr().out
    for shown in (
        "    rounds=7 ",
        "    adapter.shared.batch_size=20 ",
        "    base.path=glyphs ",
        "  fleet.profiles[]: ",
    ):
        assert shown in helped


def test_schemas_of_commands_are_tested() -> None:
    named = {command.schema.partition(":")[2] for command in COMMANDS.values() if command.schema}
    assert named <= {schema.__name__ for schema in SCHEMAS}
