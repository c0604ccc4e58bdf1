"""Components are selected by groups; options that the selected ones don't have are refused when composed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import AntherError
from conf.components import ComponentConfig
from conf.compose import compose, compose_federation
from conf.groups import choices, group_options
from conf.schemas.server import ServeConfig
from tests.conf.test_cli import run

RULES = "afa, foolsgold, geometric_median, krum, median, norm_bound, replay, trimmed_mean"
REFUSED = {
    "aggregation=fedit aggregation.max_rank=8": "aggregation.max_rank: no option of aggregation=fedit, which has none; "
    "it belongs to aggregation=exact",
    "aggregation=exact aggregation.max_ranks=8": "aggregation.max_ranks: no option of aggregation=exact, which has "
    "max_rank, energy_fraction, weighting; did you mean aggregation.max_rank?",
    "server_optimizer=fedavgm server_optimizer.beta2=0.5": "server_optimizer.beta2: no option of "
    "server_optimizer=fedavgm, which has lr, momentum; it belongs to server_optimizer=fedadam, "
    "server_optimizer=fedyogi",
    "selection=oort selection.candidate_factor=5": "selection.candidate_factor: no option of selection=oort, which has "
    "alpha, exploration, exploration_decay, min_exploration, cutoff, clip_quantile, duration_quantile, pacer_window, "
    "pacer_step, max_selections; it belongs to selection=deadline, selection=energy_delay, selection=power_of_choice",
    "selection=round_robin selection.utility_weight=0.0": "selection.utility_weight: no option of "
    "selection=round_robin, which has none; it belongs to selection=eafl",
    "robust.krum.outlier_fraction=0.4": "robust.krum.outlier_fraction: only with robust=[krum]; selected are none",
    "robust=[afa] robust.norm_bound.factor=2": "robust.norm_bound.factor: only with robust=[norm_bound]; selected are "
    "afa",
    "robust=[krum] robust.krum.outliers=0.4": "robust.krum.outliers: no option of robust=krum, which has "
    "outlier_fraction",
    "robust.kurm.outlier_fraction=0.4": f"robust.kurm.outlier_fraction: no such rule; did you mean krum?; known are "
    f"{RULES}",
    "robust=[mean]": f"robust=[mean]: no such rule; did you mean median?; known are {RULES}",
    "+robust.krum=3": "robust.krum=3: is a group of keys, not a value",
    "robust=[krum,afa,krum]": "robust=[krum,afa,krum]: krum is selected twice; name each rule once",
    "aggregation=[exact,fedit]": "aggregation=[exact,fedit]: aggregation has one choice; use aggregation=fedit",
    "privacy=[none,example]": "privacy=[none,example]: privacy has one choice; use privacy=example",
    "round_loop.name=async": "round_loop.name=async: renamed to round_loop=async",
    "server_optimizer=lion": "server_optimizer=lion: no such option; server_optimizer is one of: fedadam, fedavgm, "
    "fedyogi, none",
    "planning=devices": "planning=devices: no such option; did you mean device?; planning is one of: device, full",
    "round_loop.buffer_size=3": "round_loop.buffer_size=3: only used by round_loop=async; remove it",
    "round_loop.concurrency=3": "round_loop.concurrency=3: only used by round_loop=async; remove it",
    "round_loop=async round_loop.concurrency=0": "round_loop.concurrency=0: must be 1 or more with round_loop=async",
    "round_loop=async round_loop.buffer_size=null": "round_loop.buffer_size=null: must be 1 or more with "
    "round_loop=async",
}


@pytest.mark.integration
@pytest.mark.parametrize("words", REFUSED)
def test_option_of_another_component_is_refused(words: str) -> None:
    for composing in (compose, compose_federation):
        with pytest.raises(AntherError) as refused:
            composing(words)
        assert str(refused.value) == REFUSED[words]


@pytest.mark.integration
def test_refusal_imports_no_torch() -> None:
    words = ("robust=[kurm]", "server_optimizer=adam", "aggregation=fedit aggregation.max_rank=8")
    script = (
        "import sys\nfrom common.errors import AntherError\nfrom conf.compose import compose\n"
        f"for words in {words}:\n    try:\n        compose(words)\n    except AntherError:\n        print(words)\n"
        "assert not {'torch', 'strategies', 'flwr'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ran.stdout.splitlines() == list(words)


@pytest.mark.integration
def test_components_of_a_configuration() -> None:
    config = compose("aggregation=exact aggregation.max_rank=9 server_optimizer=fedyogi server_optimizer.lr=0.5")
    assert config.aggregation == ComponentConfig(
        "exact", {"max_rank": 9, "energy_fraction": None, "weighting": "device"}
    )
    assert config.server_optimizer.name == "fedyogi"
    assert config.server_optimizer.options == {"lr": 0.5, "momentum": 0.9, "beta2": 0.99, "tau": 0.001}
    assert compose("selection=eafl selection.alpha=3").selection.options["alpha"] == 3
    assert compose("").selection == ComponentConfig("random", {})


@pytest.mark.parametrize("rules", ["", "krum", "krum,norm_bound", "norm_bound,krum,median"])
def test_rules_keep_their_order(rules: str) -> None:
    assert list(compose(f"robust=[{rules}]").robust) == [rule for rule in rules.split(",") if rule]


def test_options_of_rules() -> None:
    assert compose("robust=[afa,krum] robust.krum.outlier_fraction=0.3").robust == {
        "afa": {"xi": 2.0, "step": 0.5},
        "krum": {"outlier_fraction": 0.3},
    }


@pytest.mark.integration
def test_groups_of_values() -> None:
    assert compose("").compression.upload == "fp32"
    for precision in ("fp16", "int8", "int4"):
        compression = compose(f"compression={precision} compression.keep_fraction=0.5").compression
        assert (compression.upload, compression.download, compression.keep_fraction) == (precision, precision, 0.5)
    loop = compose("round_loop=async round_loop.buffer_size=3 round_loop.quorum=2 fleet=week").round_loop
    assert (loop.name, loop.buffer_size, loop.concurrency, loop.quorum) == ("async", 3, 10, 2)
    planning = compose("planning=device planning.deadline=3").planning
    assert (planning.name, planning.deadline) == ("device", 3)


def test_comments_are_the_meanings() -> None:
    options = group_options("selection", "eafl")
    assert options["utility_weight"].meaning == ("Weight of utility, against the battery that a round leaves, 0 to 1.")
    assert options["alpha"] == group_options("selection", "oort")["alpha"]
    assert options["alpha"].value == 2.0
    assert group_options("aggregation", "exact")["weighting"].meaning.startswith("Weights of the mean: device")
    assert choices("aggregation")["fedit"].meaning == (
        "The mean of A and the mean of B, the usual baseline (FedIT, arXiv:2305.05644)."
    )
    assert group_options("aggregation", "fedsb") == group_options("aggregation", "mine") == {}


@pytest.mark.integration
def test_own_yaml_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Options of a plug-in that a user's own file lists are checked like those of built-in components."""
    (tmp_path / "aggregation").mkdir()
    (tmp_path / "aggregation" / "mine.yaml").write_text("name: my_package.rules:MyRule\nlength: 0.5\n")
    arguments = ("--config-dir", str(tmp_path), "aggregation=mine")
    assert run(monkeypatch, *arguments, "aggregation.length=2") == 0
    assert run(monkeypatch, *arguments, "aggregation.lenth=2") == 2
    assert capsys.readouterr().err == (
        "error: aggregation.lenth: no option of aggregation=my_package.rules:MyRule, which has length; did you mean "
        "aggregation.length?\n"
    )


@pytest.mark.integration
def test_help_shows_selected_components_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--help", "aggregation=fedit", "robust=[krum]", "robust.krum.outlier_fraction=0.3") == 0
    lines = capsys.readouterr().out.splitlines()
    selected = next(number for number, line in enumerate(lines) if line.startswith("    aggregation=fedit "))
    others = next(number for number, line in enumerate(lines) if line.startswith("    aggregation=exact "))
    assert selected < others
    assert lines[others + 1].startswith("      aggregation.max_rank=16 ")
    assert "      robust.krum.outlier_fraction=0.3      Fraction of devices that is left out." in lines
    assert "      server_optimizer.beta2=0.99           β₂." in lines
    assert "    planning: device, full" in lines


@pytest.mark.integration
def test_help_of_a_server_has_its_groups(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from server.supervisor.run import main as serve

    monkeypatch.setattr(sys, "argv", ["anther serve", "--help"])
    with pytest.raises(SystemExit):
        serve()
    printed = capsys.readouterr().out
    assert "    preset: people, private\n" in printed
    section = printed.partition("Groups (group=option)\n")[2].partition("Keys of the server")[0]
    groups = [line.partition(":")[0].strip() for line in section.splitlines() if line.startswith("    ")]
    assert groups == [
        "adapter",
        "aggregation",
        "base",
        "compression",
        "personalization",
        "planning",
        "preset",
        "privacy",
        "robust",
        "round_loop",
        "selection",
        "server_optimizer",
        "tracker",
    ]
    assert hasattr(ServeConfig(), "server")
