"""Rounds of a real federation on a tiny base with updates in every precision."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from models.base.base import Base
from models.lora.adapter import Adapter, init_adapter
from privacy.storage import FileStorage
from server.ledger import ServerLedger
from server.rounds import checkpoint
from server.rounds.loop import run_rounds
from server.rounds.state import RunState
from simulations.fleet.participants import participants
from simulations.grid.cohort import CohortGrid
from strategies.factory.full_plan import training_plan
from strategies.factory.strategy import build
from tests.helpers.configs import compose
from training.engine import perform

TINY = (
    "data.writers=2 data.validation=1 rounds=3 adapter.shared.rank=4 adapter.shared.steps=2 "
    "adapter.shared.batch_size=2 adapter.shared.lr=1e-2"
)
GUARANTEES = {"open": "privacy=none", "example": "privacy=example", "device": "privacy=device"}


pytestmark = pytest.mark.usefixtures("one_thread")


def federated(base: Base, folder: Path, overrides: str, *, saved: RunState | None = None, rounds: int = 2) -> RunState:
    config = compose(f"{TINY} {overrides}")
    plan = training_plan(config, run="run", base=base.hash)
    ledger = ServerLedger(FileStorage(folder / "server")) if config.privacy.of_devices else None
    strategy = build(config, plan, base.sites, accept_simulated=True, ledger=ledger)
    people = participants(config, base, lambda name: FileStorage(folder / name))
    grid = CohortGrid(
        [person.device for person in people], partial(perform, base, memory=2**28, timesteps=1), batched=True
    )
    state = saved or RunState.start(run="run", private=strategy.private, adapter=init_adapter(base.sites, 4, seed=0))
    return run_rounds(
        grid=grid,
        strategy=strategy,
        state=state,
        rounds=rounds,
        checkpoints=folder / "checkpoints",
        on_round=lambda _: None,
    )


def flat(adapter: Adapter) -> torch.Tensor:
    return torch.cat([part.flatten() for pair in adapter.values() for part in pair])


def sent(state: RunState) -> int:
    """Return the bytes of all updates; none was rejected."""
    trained = [done.train for done in state.history if done.train]
    assert all(facts.dropped == {} for facts in trained)
    return sum(facts.bytes_up for facts in trained)


PRECISIONS = {"fp16": (1.9, 0.01), "int8": (3.5, 0.05), "int4": (6.5, 0.5)}
"""How many times smaller an update is at least, and how far its effect may be from the exact one."""
LINEAR = [("fedit", name) for name in GUARANTEES]
PAIRS = [*LINEAR, ("exact", "open"), ("exact", "example")]  # a guarantee per device requires a linear rule
SAMPLE = dict(zip(PAIRS, (list(PRECISIONS), ["int4"], ["int8"], ["int4"], ["fp16"]), strict=True))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("strategy", "guarantee", "precisions"),
    [
        *((*pair, precisions) for pair, precisions in SAMPLE.items()),
        *(pytest.param(*pair, list(PRECISIONS), marks=pytest.mark.stress) for pair in PAIRS[1:]),
    ],
)
def test_fewer_bytes_give_similar_results(
    base: Base, tmp_path: Path, strategy: str, guarantee: str, precisions: list[str]
) -> None:
    start = flat(init_adapter(base.sites, 4, seed=0))
    chosen = f"aggregation={strategy} {GUARANTEES[guarantee]} compression.upload="
    whole = federated(base, tmp_path / "fp32", f"{chosen}fp32")
    for precision in precisions:
        least, apart = PRECISIONS[precision]
        state = federated(base, tmp_path / precision, chosen + precision)
        assert sent(whole) > least * sent(state)
        if strategy == "fedit":  # of exact, factors of one product may turn
            moved = (flat(whole.adapter) - start).norm()
            assert 0 < (flat(state.adapter) - flat(whole.adapter)).norm() < apart * moved


@pytest.mark.integration
def test_half_of_the_blocks_takes_half_of_the_bytes(base: Base, tmp_path: Path) -> None:
    chosen = "aggregation=fedit privacy=none compression.upload=int4"
    whole = federated(base, tmp_path / "whole", chosen)
    half = federated(base, tmp_path / "half", f"{chosen} compression.keep_fraction=0.5")
    assert 0.5 < sent(half) / sent(whole) < 0.6


@pytest.mark.integration
def test_quantized_downloads_can_be_resumed(base: Base, tmp_path: Path) -> None:
    chosen = "aggregation=fedit compression.download=int8"
    state = federated(base, tmp_path / "few", chosen)
    numbers = flat(init_adapter(base.sites, 4, seed=0)).numel()
    assert 0.7 < received(state) / (2 * 2 * numbers) < 1.04  # at first B is 0
    before = federated(base, tmp_path / "parts", chosen, rounds=1)
    parts = federated(base, tmp_path / "parts", chosen, saved=before)
    assert torch.equal(flat(parts.adapter), flat(state.adapter))


def received(state: RunState) -> int:
    """Return the bytes of all adapters that were sent for training."""
    return sum(done.train.bytes_down for done in state.history if done.train)


@pytest.mark.integration
@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_repeated_round_gives_same_results(base: Base, tmp_path: Path, guarantee: str) -> None:
    """The server died after the replies and before its checkpoint: devices repeat their replies."""
    chosen = f"aggregation=fedit {GUARANTEES[guarantee]} compression.upload=int4"
    whole = federated(base, tmp_path / "whole", chosen)
    broken = tmp_path / "broken"
    before = federated(base, broken, chosen, rounds=1)
    federated(base, broken, chosen, saved=before)
    for file in (broken / "checkpoints" / "round-000002").iterdir():
        file.unlink()
    (broken / "checkpoints" / "round-000002").rmdir()
    saved = checkpoint.load(broken / "checkpoints", sites=base.sites)
    assert saved is not None
    assert saved.round == 1
    again = federated(base, broken, chosen, saved=saved)
    assert torch.equal(flat(again.adapter), flat(whole.adapter))
