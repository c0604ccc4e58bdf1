"""Bad or missing replies never stop a run, for every aggregation rule, and the next round succeeds.

Whether a reply is valid hardly depends on the rule: each rule meets two misfortunes, and all in the stress tier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from models.lora.adapter import init_adapter, rank
from models.lora.lora_xs import zero_adapter
from protocol.messages import Update
from server.rounds.loop import run_rounds
from server.rounds.state import RunState
from simulations.grid.cohort import CohortGrid
from strategies.factory.full_plan import training_plan
from strategies.factory.strategy import build
from strategies.flower_strategy import FlowerStrategy
from strategies.registry import AGGREGATIONS
from tests.helpers.configs import compose
from tests.helpers.fleet import REPORT, SITES, FakeDevice, bases_file, handle, perform

NAMES = "abcd"


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Update], Update]:
    return lambda reply: replace(reply, adapter=save(change(load(reply.adapter))))


def fail(_: Update) -> Update:
    raise RuntimeError("out of memory")


def without_first(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[1:])


def with_extra(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "z.lora_A": torch.zeros(3, 4)}


def transposed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part.T.contiguous() if part.shape[0] != part.shape[1] else part[:1] for name, part in tensors.items()}


MISFORTUNES: dict[str, tuple[Callable[[Update], Update], bool]] = {
    "all fail": (fail, False),
    "a key is missing": (change_tensors(without_first), False),
    "an extra key": (change_tensors(with_extra), False),
    "wrong shapes": (change_tensors(transposed), False),
    "another rank than requested": (lambda reply: replace(reply, rank=reply.rank + 1), False),
    "not a number": (
        change_tensors(lambda tensors: {name: part * float("nan") for name, part in tensors.items()}),
        False,
    ),
    "no tensors": (lambda reply: replace(reply, adapter=b""), False),
    "only zeros": (change_tensors(lambda tensors: {name: 0 * part for name, part in tensors.items()}), True),
}
"""Change of every reply, and whether it is still accepted."""


def spoil(change: Callable[[Update], Update], in_rounds: tuple[int, ...] = (1, 2, 3)) -> Callable[[Any], Any]:
    """Change the updates of these rounds, and no other replies."""
    return lambda reply: change(reply) if isinstance(reply, Update) and reply.round in in_rounds else reply


def make_strategy(name: str, folder: Path, overrides: str = "") -> tuple[FlowerStrategy, RunState]:
    option = f"adapter.lora_xs_bases={bases_file(folder)}" if name == "fedsb" else ""
    config = compose(
        f"aggregation={name} adapter.shared.rank=3 adapter.shared.steps=2 rounds=3 data.writers=4 {option} {overrides}"
    )
    plan = training_plan(config, run="run", base="base")
    federated = build(config, plan, SITES, accept_simulated=True)
    bases = federated.format.lora_xs_bases
    adapter = zero_adapter(bases) if bases else init_adapter(SITES, 3, seed=0)
    return federated, RunState.start(run="run", private=False, adapter=adapter)


def run(
    federated: FlowerStrategy, state: RunState, devices: list[FakeDevice], folder: Path, on_round: Any = None
) -> RunState:
    return run_rounds(
        grid=CohortGrid(devices, perform),  # type: ignore[arg-type]
        strategy=federated,
        state=state,
        rounds=3,
        checkpoints=folder,
        on_round=on_round or (lambda _: None),
    )


@pytest.mark.parametrize(
    ("name", "misfortune"),
    [
        pytest.param(name, misfortune, marks=[] if (i + j) % 4 == 0 else pytest.mark.stress)
        for i, name in enumerate(AGGREGATIONS)
        for j, misfortune in enumerate(MISFORTUNES)
    ],
)
def test_round_after_bad_replies_succeeds(name: str, misfortune: str, tmp_path: Path) -> None:
    change, accepted = MISFORTUNES[misfortune]
    federated, state = make_strategy(name, tmp_path)
    devices = [FakeDevice(device, misbehave=spoil(change, in_rounds=(2,))) for device in NAMES]
    final = run(federated, state, devices, tmp_path / "checkpoints")
    rounds = [done.train for done in final.history if done.train]
    assert [train.replied for train in rounds] == [4, 4 if accepted else 0, 4]
    assert sum(rounds[1].dropped.values()) == (0 if accepted else 4)
    assert all(part.isfinite().all() for factors in final.adapter.values() for part in factors)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_only_valid_reply_counts(name: str, tmp_path: Path) -> None:
    bad = [MISFORTUNES[which][0] for which in ("all fail", "a key is missing", "not a number")]
    devices = [FakeDevice(device, misbehave=spoil(change)) for device, change in zip("abc", bad, strict=True)]
    federated, state = make_strategy(name, tmp_path)
    final = run(federated, state, [*devices, FakeDevice("d")], tmp_path / "checkpoints")
    assert [done.train.replied for done in final.history if done.train] == [1, 1, 1]


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_mixed_ranks_and_sites(name: str, tmp_path: Path) -> None:
    """Rules with a single rank ask only the devices that train it."""
    limits: list[dict[str, Any]] = [
        {},
        {"rank": 1},
        {"rank": 2, "sites": ("x",)},
        {"rank": 16, "sites": ("y", "nowhere")},
    ]
    devices = [
        FakeDevice(device, report=replace(REPORT, device=device, **limit))
        for device, limit in zip(NAMES, limits, strict=True)
    ]
    federated, state = make_strategy(name, tmp_path)
    final = run(federated, state, devices, tmp_path / "checkpoints")
    asked = 4 if AGGREGATIONS[name].mixed_ranks else 2
    assert [(done.train.asked, done.train.replied) for done in final.history if done.train] == 3 * [(asked, asked)]
    assert rank(final.adapter) >= 3


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_no_eligible_devices(name: str, tmp_path: Path) -> None:
    federated, state = make_strategy(name, tmp_path, "cohort.eligibility.idle=true")
    devices = [FakeDevice(device, report=replace(REPORT, device=device, busy=True)) for device in NAMES]
    final = run(federated, state, devices, tmp_path / "checkpoints")
    assert [(done.train.asked, done.train.replied) for done in final.history if done.train] == 3 * [(0, 0)]
    assert final.round == 3
