"""Nothing that devices send, or don't, stops a run: every rule, through the real loop, with a good round after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from conf.compose import compose
from models.lora.adapter import init_adapter, rank
from models.lora.lora_xs import zero_adapter
from protocol.messages import Update
from server.rounds.loop import run_rounds
from server.rounds.state import RunState
from simulations.grid.cohort import CohortGrid
from strategies.build import build
from strategies.planning.full_plan import training_plan
from strategies.registry import AGGREGATIONS
from strategies.strategy import Federated
from tests.helpers.fleet import REPORT, SITES, FakeDevice, bases_file, handle, perform

NAMES = "abcd"
composed = cache(compose)


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def edited(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Update], Update]:
    return lambda reply: replace(reply, adapter=save(change(load(reply.adapter))))


def fails(_: Update) -> Update:
    raise RuntimeError("out of memory")


def without_one(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(found.items())[1:])


def with_one_more(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**found, "z.lora_A": torch.zeros(3, 4)}


def transposed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part.T.contiguous() if part.shape[0] != part.shape[1] else part[:1] for name, part in found.items()}


MISFORTUNES: dict[str, tuple[Callable[[Update], Update], bool]] = {
    "all fail": (fails, False),
    "a key is missing": (edited(without_one), False),
    "there is one too many": (edited(with_one_more), False),
    "shapes of something else": (edited(transposed), False),
    "another rank than was asked": (lambda reply: replace(reply, rank=reply.rank + 1), False),
    "not a number": (edited(lambda found: {name: part * float("nan") for name, part in found.items()}), False),
    "no tensors at all": (lambda reply: replace(reply, adapter=b""), False),
    "nothing but zeros": (edited(lambda found: {name: 0 * part for name, part in found.items()}), True),
}
"""What happens to every reply, and whether it is let in all the same."""


def spoilt(wrong: Callable[[Update], Update], in_rounds: tuple[int, ...] = (1, 2, 3)) -> Callable[[Any], Any]:
    """Updates of these rounds, spoilt; whatever else a device replies as it is."""
    return lambda reply: wrong(reply) if isinstance(reply, Update) and reply.round in in_rounds else reply


def made(name: str, folder: Path, more: str = "") -> tuple[Federated, RunState]:
    option = f"adapter.lora_xs_bases={bases_file(folder)}" if name == "fedsb" else ""
    config = composed(
        f"aggregation={name} adapter.shared.rank=3 adapter.shared.steps=2 rounds=3 data.writers=4 {option} {more}"
    )
    plan = training_plan(config, run="run", base="base")
    federated = build(config, plan, SITES, accept_simulated=True)
    begun = zero_adapter(federated.lora_xs_bases) if federated.lora_xs_bases else init_adapter(SITES, 3, seed=0)
    return federated, RunState.start(run="run", private=False, adapter=begun)


def run(
    federated: Federated, state: RunState, devices: list[FakeDevice], folder: Path, on_round: Any = None
) -> RunState:
    return run_rounds(
        grid=CohortGrid(devices, perform),  # type: ignore[arg-type]
        strategy=federated,
        state=state,
        rounds=3,
        checkpoints=folder,
        on_round=on_round or (lambda _: None),
    )


@pytest.mark.parametrize("misfortune", MISFORTUNES)
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_after_a_round_gone_wrong_the_next_is_good(name: str, misfortune: str, tmp_path: Path) -> None:
    wrong, let_in = MISFORTUNES[misfortune]
    federated, state = made(name, tmp_path)
    devices = [FakeDevice(each, misbehave=spoilt(wrong, in_rounds=(2,))) for each in NAMES]
    found = run(federated, state, devices, tmp_path / "checkpoints")
    rounds = [done.train for done in found.history if done.train]
    assert [each.replied for each in rounds] == [4, 4 if let_in else 0, 4]
    assert sum(rounds[1].dropped.values()) == (0 if let_in else 4)
    assert all(part.isfinite().all() for factors in found.adapter.values() for part in factors)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_one_good_reply_among_bad_ones_counts_alone(name: str, tmp_path: Path) -> None:
    bad = [MISFORTUNES[which][0] for which in ("all fail", "a key is missing", "not a number")]
    devices = [FakeDevice(each, misbehave=spoilt(wrong)) for each, wrong in zip("abc", bad, strict=True)]
    federated, state = made(name, tmp_path)
    found = run(federated, state, [*devices, FakeDevice("d")], tmp_path / "checkpoints")
    assert [done.train.replied for done in found.history if done.train] == [1, 1, 1]


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_devices_of_different_ranks_and_sites(name: str, tmp_path: Path) -> None:
    """Rules of one rank ask those alone who train it."""
    limits: list[dict[str, Any]] = [
        {},
        {"rank": 1},
        {"rank": 2, "sites": ("x",)},
        {"rank": 16, "sites": ("y", "nowhere")},
    ]
    devices = [
        FakeDevice(each, report=replace(REPORT, device=each, **limit))
        for each, limit in zip(NAMES, limits, strict=True)
    ]
    federated, state = made(name, tmp_path)
    found = run(federated, state, devices, tmp_path / "checkpoints")
    asked = 4 if AGGREGATIONS[name].mixed_ranks else 2
    assert [(done.train.asked, done.train.replied) for done in found.history if done.train] == 3 * [(asked, asked)]
    assert rank(found.adapter) >= 3


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_nobody_may_be_asked(name: str, tmp_path: Path) -> None:
    federated, state = made(name, tmp_path, "cohort.eligibility.idle=true")
    devices = [FakeDevice(each, report=replace(REPORT, device=each, busy=True)) for each in NAMES]
    found = run(federated, state, devices, tmp_path / "checkpoints")
    assert [(done.train.asked, done.train.replied) for done in found.history if done.train] == 3 * [(0, 0)]
    assert found.round == 3
