"""Run a simulation with a custom aggregation rule, without registering it:  python examples/own_strategy.py

docs/extending.md shows how a rule becomes `aggregation=NAME` on the command line.
"""

# %% A rule: the mean of A and B, where no device counts more than twice the median weight
from __future__ import annotations

from pathlib import Path
from statistics import median
from tempfile import mkdtemp

from conf.compose import compose
from models.lora.adapter import Adapter, init_adapter
from server.rounds.loop import run_rounds
from server.rounds.state import Round, RunState
from simulations import setup
from simulations.grid.cohort import CohortGrid
from strategies.aggregation import Aggregated, Linearity, Updates
from strategies.aggregation.fedit import FedIT
from strategies.cohort import CohortRule
from strategies.download import AdapterFormat
from strategies.factory.full_plan import training_plan
from strategies.selection.everyone import Everyone
from strategies.server_update import ServerUpdate
from strategies.strategy import FederatedStrategy
from training.capacity import budget


class CappedWeights(FedIT):
    """FedIT with weights that are capped at twice their median."""

    sensitivity = Linearity(linear=False, reason="the cap depends on the weights of all devices")

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """Aggregate one round."""
        cap = 2 * median(weight for _, weight in updates)
        return super().aggregate(current, [(adapter, min(weight, cap)) for adapter, weight in updates], round=round)


# %% Base, devices and plan, from a configuration
folder = Path(mkdtemp(prefix="anther-"))
config = compose("preset=quick data.writers=3")
base, people, *_ = setup.build(config, folder)
plan = training_plan(config, run="example", base=base.hash)
strategy = FederatedStrategy(
    plan=plan,
    format=AdapterFormat(sites=base.sites),
    update=ServerUpdate(aggregation=CappedWeights()),
    cohort=CohortRule(selection=Everyone()),
)
grid = CohortGrid(
    [person.device for person in people],
    setup.make_perform(config, base, budget(config.trainer.memory_gib, base.device)),
)


# %% Three rounds
def on_round(record: Round) -> None:
    """Print the loss on held-out pictures after a round."""
    if record.validation.shared is not None:  # round 0 is the state before training, and isn't evaluated
        print(f"round {record.number}: {record.validation.shared:.4f} ({record.validation.base:.4f} for the base)")


state = run_rounds(
    grid=grid,
    strategy=strategy,
    state=RunState.start(run=plan.run, private=False, adapter=init_adapter(base.sites, plan.rank, seed=0)),
    rounds=3,
    checkpoints=folder / "checkpoints",
    on_round=on_round,
)
print(f"best round: {state.best_round}; checkpoints: {folder}")
