"""The ServerApp: `flwr run . -c 'overrides="rounds=3 privacy=example"'`.

All output is in ANTHER_HOME/runs/<run>: the working directory of a ServerApp is that of its SuperLink.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import AntherError
from common.plugins import allow_installed_plugins
from conf.compose import compose_federation
from models.base.base import load
from models.files import assets
from models.lora.adapter import adapter_shapes
from privacy.storage import FileStorage
from protocol.tensor_codec import max_payload
from server.grid.validating_grid import ValidatingGrid
from server.ledger import ServerLedger
from server.report.trackers import open_trackers, round_metrics
from server.rounds import checkpoint
from server.rounds.federation import federate
from server.rounds.state import Round
from server.supervisor.run_dirs import mark_finished, run_folder, save_refusal
from server.supervisor.run_log import log_through_flower
from server.supervisor.superlink import save_largest_adapter
from strategies.clock import WallClock
from strategies.factory.combination import check_configuration
from strategies.factory.full_plan import training_plan
from strategies.factory.strategy import build

log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation with the `overrides` of the run configuration, then personalize on every device.

    `resume=true` continues the newest run of the same configuration. ANTHER_TEST=true makes it a test: updates with
    reproducible noise are accepted, and no part of the run is a private release.
    """
    log_through_flower("server", "strategies")
    allow_installed_plugins()
    runs = assets.home() / "runs"
    try:
        _federate(grid, context, runs)
    except AntherError as error:  # the user has to act: a retry can't succeed
        save_refusal(runs, context.run_id, str(error))
        raise


def _federate(grid: Grid, context: Context, runs: Path) -> None:
    overrides = str(context.run_config.get("overrides", ""))
    config = compose_federation(overrides)
    check_configuration(config)  # before the base is loaded
    base = load(config.base.path, sites=config.adapter.sites, weights=config.base.weights)
    folder = run_folder(overrides, runs)
    plan = training_plan(config, run=folder.name, base=base.hash)
    test = os.environ.get("ANTHER_TEST") == "true"
    ledger = ServerLedger(FileStorage(folder))
    strategy = build(config, plan, base.sites, accept_simulated=test, ledger=ledger, base=base)
    saved = checkpoint.load(folder / "checkpoints", sites=base.sites)
    save_largest_adapter(max_bytes := max_payload(adapter_shapes(base.sites, plan.rank)))
    log.info("run %s in %s, from round %d", plan.run, folder, saved.round + 1 if saved else 0)
    settings = context.run_config
    with open_trackers(folder, tensorboard=config.tracker.tensorboard) as tracker:

        def on_round(done: Round) -> None:
            tracker.log(done.number, round_metrics(done))
            _log_round(done, config.rounds)

        for done in saved.history if saved else ():  # a kill may have prevented that a line was written
            tracker.log(done.number, round_metrics(done))
        state = federate(
            config,
            grid=ValidatingGrid(grid, largest=max_bytes),
            strategy=strategy,
            plan=plan,
            saved=saved,
            checkpoints=folder / "checkpoints",
            on_round=on_round,
            min_devices=max(config.cohort.size or 1, int(settings.get("min_devices", 1))),
            wait_forever=True,
            patience=float(settings.get("patience", math.inf)),
            clock=WallClock(),
        )
    best = state.best_round
    mark_finished(folder)
    log.info("done: %d round%s, best round %d", state.round, "" if state.round == 1 else "s", best)


def _log_round(done: Round, rounds: int) -> None:
    """Log one line for a round."""
    train, validation = done.train, done.validation
    if train is None:
        return
    dropped = ", ".join(f"{count} {reason}" for reason, count in train.dropped.items())
    text = f"{train.replied} of {train.asked} replied" + (f" ({dropped})" if dropped else "")
    if validation.score is not None:
        text += f", {validation.score:.1%} off the base's loss ({validation.base:.4f} to {validation.shared:.4f})"
    if validation.gain is not None:
        text += f", gain {validation.gain:.5f} ± {validation.gain_error:.5f} by its noise"
    text += "".join(f", {guarantee}" for guarantee in done.guarantees)
    log.info("round %d of %d: %s, %.1f s", done.number, rounds, text, done.wall_seconds)
