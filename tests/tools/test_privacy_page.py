"""docs/privacy.md is what the code does: what it says runs runs a round, all else is refused for its reason."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from flwr.app import ConfigRecord

from common.errors import AntherError
from conf.compose import compose
from models.lora.adapter import init_adapter, to_tensors
from models.lora.lora_xs import zero_adapter
from privacy.accounting import PoissonGaussian, epsilon, noise_multiplier_for
from privacy.storage import FileStorage
from protocol import records
from protocol.tensor_codec import encode
from server.ledger import ServerLedger
from simulations.grid.cohort import CohortGrid
from strategies import registry
from strategies.aggregation import Linearity
from strategies.aggregation.fedit import FedIT
from strategies.build import build, combination
from strategies.planning.full_plan import training_plan
from strategies.registry import (
    AGGREGATIONS,
    AXES,
    LEVELS,
    BuiltIn,
    Combination,
    Filtering,
    TimingDeclaration,
    combination_with,
    combinations,
    incompatibility,
    refusal_reason,
)
from strategies.selection import Sampling
from tests.helpers.fleet import SITES, FakeDevice, bases_file, handle, perform
from tools.privacy_page import page

DOCUMENT = Path(__file__).parents[2] / "docs" / "privacy.md"
ASKED = {"everyone": "", "poisson": "cohort.sampling_rate=0.5"} | {
    name: f"selection={name} cohort.size=2 planning.deadline=60"
    for name in ("random", "round_robin", "oort", "eafl", "deadline", "power_of_choice", "energy_delay")
}
KEYS = {
    "aggregation": "aggregation.name",
    "robust": "robust.rules",
    "selection": "selection",
    "timing": "round_loop.mode",
    "optimiser": "server_optimizer.name",
}
PRIVATE = [level for level in LEVELS if level != "none"]


@cache
def composed(words: str):
    return compose(words)


def configured(chosen: Combination, folder: Path):
    option = f"adapter.lora_xs_bases={bases_file(folder)}" if chosen.aggregation == "fedsb" else ""
    found = composed(
        f"{option} aggregation={chosen.aggregation} privacy={chosen.level} rounds=2 data.writers=4 adapter.shared.rank=3 "
        f"adapter.shared.steps=1 robust.rules=[{','.join(chosen.robust)}] {ASKED[chosen.selection]}"
    )
    return replace(found, round_loop=replace(found.round_loop, mode=chosen.timing))


def built(config, folder):
    plan = training_plan(config, run="r", base="base")
    return build(config, plan, SITES, accept_simulated=True, ledger=ServerLedger(FileStorage(folder)))


def test_the_committed_table_is_the_generated_one():
    assert DOCUMENT.read_text(encoding="utf-8") == page(), "run: python -m tools.privacy_page > docs/privacy.md"


def cells():
    """Of the table: each piece with the plainest others."""
    return sorted(
        {combination_with(axis, piece, level=level) for axis in AXES for piece in AXES[axis] for level in LEVELS},
        key=str,
    )


def test_a_combination_runs_if_each_of_its_pieces_does():
    """So the table is a row for each piece, and so are the runs below."""
    for chosen in combinations():
        if reason := incompatibility(chosen):  # of two pieces, privately or not
            assert refusal_reason(chosen) == reason
            continue
        pieces = {
            "aggregation": [chosen.aggregation],
            "robust": chosen.robust,
            "selection": [chosen.selection],
            "timing": [chosen.timing],
        }
        alone = [
            refusal_reason(combination_with(axis, piece, level=chosen.level)) for axis in AXES for piece in pieces[axis]
        ]
        assert (refusal_reason(chosen) is None) == all(reason is None for reason in alone)
        assert refusal_reason(chosen) in (None, *alone)


@pytest.mark.parametrize(
    "chosen", cells(), ids=lambda c: "-".join([c.aggregation, *c.robust, c.selection, c.timing, c.level])
)
def test_every_cell(chosen, tmp_path, monkeypatch):
    config = configured(chosen, tmp_path)
    assert combination(config) == chosen
    reason = refusal_reason(chosen)
    if reason is not None:
        with pytest.raises(AntherError) as caught:
            built(config, tmp_path)
        assert reason in str(caught.value)
        assert reason in DOCUMENT.read_text(encoding="utf-8")
        return
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)
    federated = built(config, tmp_path)
    grid = CohortGrid([FakeDevice(name) for name in "abcd"], perform)
    begun = zero_adapter(federated.lora_xs_bases) if federated.lora_xs_bases else init_adapter(SITES, 3, seed=0)
    start = records.adapter_to_record(encode(to_tensors(begun)))
    for number in (1, 2):
        messages = federated.configure_train(number, start, ConfigRecord(), grid)
        federated.aggregate_train(number, grid.send_and_receive(messages))
        facts = federated.trained
        assert facts.replied == facts.asked
        units = {"none": [], "example": ["image"], "device": ["device"], "both": ["image", "device"]}[chosen.level]
        told = [unit for unit in units if unit == "device" or facts.replied]  # of images devices tell
        assert [guarantee.unit for guarantee in facts.guarantees] == told


class Silent(FedIT):
    """A new rule that says nothing of itself."""

    sensitivity = None


PLANTED = {
    "aggregation": ("AGGREGATIONS", Silent),
    "robust": ("ROBUST_RULES", object()),
    "selection": ("SELECTIONS", BuiltIn(TimingDeclaration(prechargeable=True, reason="of another axis"))),
    "optimiser": ("OPTIMIZERS", object()),
    "timing": ("TIMINGS", BuiltIn(Filtering(bounded=True, reason="of another axis"))),
}


@pytest.mark.parametrize("axis", PLANTED)
@pytest.mark.parametrize("level", LEVELS)
def test_a_new_piece_that_declares_no_sensitivity_is_refused_under_privacy(monkeypatch, axis, level):
    name, piece = PLANTED[axis]
    monkeypatch.setitem(getattr(registry, name), "new", piece)
    found = refusal_reason(combination_with(axis, "new", level=level))
    assert (found is None) == (level == "none")
    assert found is None or "new declares no sensitivity" in found


def test_and_is_not_built(monkeypatch, tmp_path):
    monkeypatch.setitem(AGGREGATIONS, "new", Silent)
    config = compose("aggregation=fedit privacy=example")
    config.aggregation.name = "new"
    with pytest.raises(AntherError, match="aggregation new declares no sensitivity"):
        built(config, tmp_path)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("axis", PLANTED)
def test_what_is_not_registered_is_refused(axis, level):
    """With the list of those that are: nothing else runs in its place."""
    key = KEYS[axis]
    listed = ", ".join(getattr(registry, PLANTED[axis][0]))
    with pytest.raises(AntherError, match=f"{key}=fedavg: nothing is registered .* known are {listed}"):
        refusal_reason(combination_with(axis, "fedavg", level=level))


@pytest.mark.parametrize("key", ["aggregation.name", "server_optimizer.name", "robust.rules"])
def test_an_unknown_piece_is_not_built(key, tmp_path):
    config = compose("aggregation=fedit")
    group, _, name = key.partition(".")
    setattr(getattr(config, group), name, ["fedavg"] if name == "rules" else "fedavg")
    with pytest.raises(AntherError, match=f"{key}=fedavg: nothing is registered"):
        built(config, tmp_path)


def test_a_registered_rule_is_the_one_that_runs(monkeypatch, tmp_path):
    monkeypatch.setitem(AGGREGATIONS, "new", Silent)
    config = compose("aggregation=fedit")
    config.aggregation.name = "new"
    assert type(built(config, tmp_path)._aggregation) is Silent


def test_a_rule_that_takes_what_there_is_not_is_refused(monkeypatch, tmp_path):
    class Greedy(FedIT):
        def __init__(self, rank, temperature):
            self.rank, self.temperature = rank, temperature

    monkeypatch.setitem(AGGREGATIONS, "new", Greedy)
    config = compose("aggregation=fedit")
    config.aggregation.name = "new"
    with pytest.raises(AntherError, match="it takes temperature, and is given rank, seed"):
        built(config, tmp_path)


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
            TimingDeclaration(prechargeable=False, reason="whoever comes is taken"),
            ["device", "both"],
        ),
    ],
)
def test_what_a_piece_declares_decides(monkeypatch, axis, name, declared, refused):
    monkeypatch.setitem(getattr(registry, name), "new", BuiltIn(declared))
    for level in LEVELS:
        found = refusal_reason(combination_with(axis, "new", level=level))
        assert (found is not None) == (level in refused)
        assert found is None or declared.reason in found


@pytest.mark.parametrize(
    ("rate", "rounds", "delta", "asked"),
    [(0.3, 10, 1e-3, {3: 9.6, 6: 15.4}), (0.05, 100, 1e-3, {5: 18.4, 10: 30.5}), (0.01, 200, 1e-5, {2: 15.7, 5: 28.8})],
)
def test_what_a_sample_that_was_seen_is_worth_is_what_the_page_says(rate, rounds, delta, asked):
    z = noise_multiplier_for(epsilon=8.0, delta=delta, sampling_rate=rate, steps=rounds)
    for times, told in asked.items():
        seen = PoissonGaussian(noise_multiplier=z, sampling_rate=1.0, steps=times)
        assert epsilon([seen], delta).value == pytest.approx(told, abs=0.06)
        assert f"{times} rounds: {told}" in page()
