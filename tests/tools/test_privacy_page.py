"""docs/privacy.md matches the code: combinations that run complete a round, others are refused for the given reason."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import AntherError
from conf.components import ComponentConfig
from models.lora.adapter import init_adapter
from models.lora.lora_xs import zero_adapter
from privacy.accounting import PoissonGaussian, epsilon, noise_multiplier_for
from privacy.storage import FileStorage
from server.ledger import ServerLedger
from simulations.grid.cohort import CohortGrid
from strategies import registry
from strategies.aggregation import Linearity
from strategies.aggregation.fedit import FedIT
from strategies.factory.combination import combination
from strategies.factory.full_plan import training_plan
from strategies.factory.strategy import build
from strategies.registry import AGGREGATIONS, AXES, BuiltIn, TimingDeclaration
from strategies.robust import Filtering
from strategies.round.request import RoundStart
from strategies.selection import Sampling
from strategies.validation.combination import LEVELS, Combination, combination_with, combinations
from strategies.validation.privacy import incompatibility, refusal_reason
from tests.helpers.configs import compose
from tests.helpers.fleet import SITES, FakeDevice, bases_file, handle, perform
from tests.helpers.strategies import train_round
from tools.privacy_page import page

DOCUMENT = Path(__file__).parents[2] / "docs" / "privacy.md"
SELECTION_OPTIONS = {"everyone": "", "poisson": "cohort.sampling_rate=0.5"} | {
    name: f"selection={name} cohort.size=2 planning.deadline=60"
    for name in ("random", "round_robin", "oort", "eafl", "deadline", "power_of_choice", "energy_delay")
}
KEYS = {
    "aggregation": "aggregation",
    "robust": "robust",
    "selection": "selection",
    "timing": "round_loop",
    "optimizer": "server_optimizer",
}
PRIVATE = [level for level in LEVELS if level != "none"]


def names(selected: Combination):
    """Return the names of the components on each axis, and the level."""
    return {
        "aggregation": selected.aggregation.name,
        "robust": tuple(rule.name for rule in selected.robust),
        "selection": selected.selection.name,
        "timing": selected.timing.name,
        "optimizer": selected.optimizer.name,
        "level": selected.level,
    }


def configure(selected: Combination, folder: Path):
    """Join parts that are composed once each: composing each cell would take half of the time."""
    chosen = names(selected)
    config = compose("rounds=2 data.writers=4 adapter.shared.rank=3 adapter.shared.steps=1")
    asked = compose(SELECTION_OPTIONS[chosen["selection"]])
    config.selection, config.cohort, config.planning = asked.selection, asked.cohort, asked.planning
    config.aggregation = compose(f"aggregation={chosen['aggregation']}").aggregation
    config.privacy = compose(f"privacy={chosen['level']}").privacy
    config.robust = {name: {} for name in chosen["robust"]}
    config.round_loop.name = chosen["timing"]
    config.round_loop.buffer_size = config.round_loop.concurrency = 10 if chosen["timing"] == "async" else None
    if chosen["aggregation"] == "fedsb":
        config.adapter.lora_xs_bases = str(bases_file(folder))
    return config


def build_strategy(config, folder):
    plan = training_plan(config, run="r", base="base")
    return build(config, plan, SITES, accept_simulated=True, ledger=ServerLedger(FileStorage(folder)))


def test_committed_page_is_up_to_date():
    assert DOCUMENT.read_text(encoding="utf-8") == page(), "run: python -m tools.privacy_page > docs/privacy.md"


def cells():
    """List the cells of the table, each once: each component in the baseline."""
    every = (
        combination_with(axis, component, level=level) for axis in AXES for component in AXES[axis] for level in LEVELS
    )
    return list({str(names(selected)): selected for selected in every}.values())


def test_combination_runs_if_each_component_runs():
    """Therefore the table and the runs below need only one row per component."""
    for selected in combinations():
        if reason := incompatibility(selected):  # of two components, at any level
            assert refusal_reason(selected) == reason
            continue
        components = {
            "aggregation": [selected.aggregation],
            "robust": selected.robust,
            "selection": [selected.selection],
            "timing": [selected.timing],
        }
        single = [
            refusal_reason(combination_with(axis, component.name, level=selected.level))
            for axis in AXES
            for component in components[axis]
        ]
        assert (refusal_reason(selected) is None) == all(reason is None for reason in single)
        assert refusal_reason(selected) in (None, *single)


@pytest.mark.integration
@pytest.mark.parametrize(
    "selected",
    cells(),
    ids=lambda c: "-".join([c.aggregation.name, *(r.name for r in c.robust), c.selection.name, c.timing.name, c.level]),
)
def test_every_cell(selected, tmp_path, monkeypatch):
    config = configure(selected, tmp_path)
    assert names(combination(config)) == names(selected)
    reason = refusal_reason(selected)
    if reason is not None:
        with pytest.raises(AntherError) as caught:
            build_strategy(config, tmp_path)
        assert reason in str(caught.value)
        assert reason in DOCUMENT.read_text(encoding="utf-8")
        return
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)
    federated = build_strategy(config, tmp_path)
    grid = CohortGrid([FakeDevice(name) for name in "abcd"], perform)
    bases = federated.format.lora_xs_bases
    adapter = zero_adapter(bases) if bases else init_adapter(SITES, 3, seed=0)
    for number in (1, 2):
        metrics = train_round(federated, grid, RoundStart(number=number, adapter=adapter)).metrics
        assert metrics.replied == metrics.asked
        units = {"none": [], "example": ["image"], "device": ["device"], "both": ["image", "device"]}[selected.level]
        expected = [unit for unit in units if unit == "device" or metrics.replied]  # devices report ε per image
        assert [guarantee.unit for guarantee in metrics.guarantees] == expected


class UndeclaredRule(FedIT):
    """New rule without a declaration."""

    sensitivity = None


NEW_COMPONENTS = {
    "aggregation": ("AGGREGATIONS", UndeclaredRule),
    "robust": ("ROBUST_RULES", object()),
    "selection": ("SELECTIONS", BuiltIn(TimingDeclaration(prechargeable=True, reason="of another axis"))),
    "optimizer": ("OPTIMIZERS", object()),
    "timing": ("TIMINGS", BuiltIn(Filtering(bounded=True, reason="of another axis"))),
}


@pytest.mark.parametrize("axis", NEW_COMPONENTS)
@pytest.mark.parametrize("level", LEVELS)
def test_undeclared_component_is_refused_under_privacy(monkeypatch, axis, level):
    name, component = NEW_COMPONENTS[axis]
    monkeypatch.setitem(getattr(registry, name), "new", component)
    reason = refusal_reason(combination_with(axis, "new", level=level))
    assert (reason is None) == (level == "none")
    assert reason is None or "new declares no sensitivity" in reason


@pytest.mark.integration
def test_undeclared_component_is_not_built(monkeypatch, tmp_path):
    monkeypatch.setitem(AGGREGATIONS, "new", UndeclaredRule)
    config = replace(compose("privacy=example"), aggregation=ComponentConfig("new"))
    with pytest.raises(AntherError, match="aggregation new declares no sensitivity"):
        build_strategy(config, tmp_path)


@pytest.mark.parametrize("axis", NEW_COMPONENTS)
def test_unregistered_component_is_refused(axis):
    """The message lists the registered names; no other component is used instead."""
    key = KEYS[axis]
    listed = ", ".join(getattr(registry, NEW_COMPONENTS[axis][0]))
    with pytest.raises(AntherError, match=f"{key}=fedavg: nothing is registered .* known are {listed}"):
        combination_with(axis, "fedavg", level="none")


@pytest.mark.parametrize("key", ["aggregation", "server_optimizer", "robust"])
def test_unregistered_component_is_not_built(key, tmp_path):
    named = {"fedavg": {}} if key == "robust" else ComponentConfig("fedavg")
    config = replace(compose("aggregation=fedit"), **{key: named})
    with pytest.raises(AntherError, match=f"{key}=fedavg: nothing is registered"):
        build_strategy(config, tmp_path)


def test_registered_rule_is_used(monkeypatch, tmp_path):
    monkeypatch.setitem(AGGREGATIONS, "new", UndeclaredRule)
    config = replace(compose(""), aggregation=ComponentConfig("new"))
    assert type(build_strategy(config, tmp_path).update.aggregation) is UndeclaredRule


def test_rule_with_unknown_parameters_is_refused(monkeypatch, tmp_path):
    class ParameterizedRule(FedIT):
        def __init__(self, rank, temperature):
            self.rank, self.temperature = rank, temperature

    monkeypatch.setitem(AGGREGATIONS, "new", ParameterizedRule)
    config = replace(compose(""), aggregation=ComponentConfig("new"))
    with pytest.raises(AntherError, match=r"^aggregation\.temperature: new needs a value$"):
        build_strategy(config, tmp_path)


@pytest.mark.parametrize(
    ("axis", "name", "declared", "refused"),
    [
        (
            "aggregation",
            "AGGREGATIONS",
            Linearity(linear=False, reason="its rank follows from data"),
            ["device", "both"],
        ),
        ("robust", "ROBUST_RULES", Filtering(bounded=False, reason="it drops outliers"), ["device", "both"]),
        (
            "selection",
            "SELECTIONS",
            Sampling(data_independent=False, amplifies=False, reason="it asks by loss"),
            PRIVATE,
        ),
        (
            "timing",
            "TIMINGS",
            TimingDeclaration(prechargeable=False, reason="every reply is taken"),
            ["device", "both"],
        ),
    ],
)
def test_declaration_decides(monkeypatch, axis, name, declared, refused):
    monkeypatch.setitem(getattr(registry, name), "new", BuiltIn(declared))
    for level in LEVELS:
        reason = refusal_reason(combination_with(axis, "new", level=level))
        assert (reason is not None) == (level in refused)
        assert reason is None or declared.reason in reason


@pytest.mark.integration
@pytest.mark.parametrize(
    ("rate", "rounds", "delta", "participations"),
    [(0.3, 10, 1e-3, {3: 9.6, 6: 15.4}), (0.05, 100, 1e-3, {5: 18.4, 10: 30.5}), (0.01, 200, 1e-5, {2: 15.7, 5: 28.8})],
)
def test_epsilon_of_an_observed_sample(rate, rounds, delta, participations):
    z = noise_multiplier_for(epsilon=8.0, delta=delta, sampling_rate=rate, steps=rounds)
    for times, expected in participations.items():
        event = PoissonGaussian(noise_multiplier=z, sampling_rate=1.0, steps=times)
        assert epsilon([event], delta).value == pytest.approx(expected, abs=0.06)
        assert f"{times} rounds: {expected}" in DOCUMENT.read_text(encoding="utf-8")
