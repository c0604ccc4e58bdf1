"""A rule of an installed package, from docs/extending.md, runs without a file of this repository."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import AntherError
from conf.compose import compose, compose_federation
from conf.schemas.federation import FederationConfig
from simulations import simulate
from strategies.factory.aggregation import build_aggregation, build_robust_rule, build_server_optimizer
from strategies.factory.selection import build_selection
from tests.helpers.packages import install
from tests.helpers.simulations import BARE, TINY
from tests.test_extending import example

MODULE = "anther_test_rules"


@pytest.fixture
def my_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    entry = {"anther.aggregation my_rule": f"{MODULE}:MyRule"}
    install(monkeypatch, tmp_path / "site", module=MODULE, source=example("class MyRule"), entry_points=entry)
    yield
    sys.modules.pop(MODULE, None)


@pytest.mark.integration
@pytest.mark.usefixtures("my_rule")
def test_installed_rule_runs_with_its_options(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With length 0 the shared adapter stays the initial one, which changes nothing."""
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    words = [f"base.path={pipeline_folder}", *TINY, *BARE, "rounds=1", "data.writers=1", "adapter.personal.steps=1"]
    result = simulate([*words, "aggregation=my_rule", "aggregation.length=0"], tmp_path / "run")
    assert result.summary["loss"]["shared"] == pytest.approx(result.summary["loss"]["base"], abs=1e-12)


@pytest.mark.usefixtures("my_rule")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("length=far", "aggregation.length=far: must be a number"),
        ("lengt=1", "aggregation.lengt: no option of my_rule, which has length"),
    ],
)
def test_wrong_option_is_refused(option: str, message: str) -> None:
    with pytest.raises(AntherError) as caught:
        build_aggregation(compose(f"aggregation=my_rule aggregation.{option}"))
    assert str(caught.value) == message


@pytest.mark.usefixtures("my_rule")
def test_import_path_is_an_option() -> None:
    rule = build_aggregation(compose(f"aggregation={MODULE}:MyRule aggregation.length=0.5"))
    assert type(rule).__name__ == "MyRule"


SCALED = """
class Scaled:
    def __init__(self, *, factor: float = 1.0) -> None:
        self.factor = factor

    def reweight(self, changes):
        return changes.scaled(self.factor)

    def step(self, current, aggregated, state):
        return None

    def select(self, devices, *, draw):
        return sorted(devices)
"""


@pytest.mark.parametrize(
    ("words", "create"),
    [
        ("robust=[krum,scaled] robust.scaled.factor=0.5", lambda config: build_robust_rule(config, "scaled")),
        (
            f"robust=[{MODULE}:Scaled,afa] robust.Scaled.factor=0.5",
            lambda config: build_robust_rule(config, f"{MODULE}:Scaled"),
        ),
        ("server_optimizer=scaled server_optimizer.factor=0.5", build_server_optimizer),
        (f"server_optimizer={MODULE}:Scaled server_optimizer.factor=0.5", build_server_optimizer),
        ("selection=scaled selection.factor=0.5 cohort.size=2", lambda config: build_selection(config, 0)),
        (f"selection={MODULE}:Scaled selection.factor=0.5 cohort.size=2", lambda config: build_selection(config, 0)),
    ],
)
def test_options_of_every_axis(
    words: str, create: Callable[[FederationConfig], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entries = {f"anther.{axis} scaled": f"{MODULE}:Scaled" for axis in ("robust", "server_optimizer", "selection")}
    install(monkeypatch, tmp_path, module=MODULE, source=SCALED, entry_points=entries)
    for composing in (compose, compose_federation):
        made = create(composing(words))
        assert (type(made).__name__, made.factor) == ("Scaled", 0.5)
    sys.modules.pop(MODULE, None)
