"""A rule of an installed package, from docs/extending.md, runs without a file of this repository."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import AntherError
from conf.compose import compose
from simulations import simulate
from strategies.factory.aggregation import build_aggregation
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
    result = simulate([*words, "aggregation=my_rule", "aggregation.options.length=0"], tmp_path / "run")
    assert result.summary["loss"]["shared"] == pytest.approx(result.summary["loss"]["base"], abs=1e-12)


@pytest.mark.usefixtures("my_rule")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("length=far", "aggregation.options.length=far: must be float"),
        ("lengt=1", "aggregation.options.lengt: no such option; known are length"),
    ],
)
def test_wrong_option_is_refused(option: str, message: str) -> None:
    with pytest.raises(AntherError) as caught:
        build_aggregation(compose(f"aggregation=my_rule aggregation.options.{option}"))
    assert str(caught.value) == message


@pytest.mark.usefixtures("my_rule")
def test_import_path_is_an_option() -> None:
    rule = build_aggregation(compose(f"aggregation={MODULE}:MyRule aggregation.options.length=0.5"))
    assert type(rule).__name__ == "MyRule"


def test_built_in_rules_have_no_options_of_their_own() -> None:
    with pytest.raises(AntherError, match=r"aggregation\.options\.length: no such option; known are none"):
        build_aggregation(compose("aggregation=fedit aggregation.options.length=1"))
