"""The ServerApp: `flwr run . -c 'overrides="rounds=3 privacy=example"'`.

Everything that it leaves lies in ANTHER_HOME/runs/<run>: a ServerApp's working directory is whatever its SuperLink was
started in.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from conf.compose import compose
from conf.errors import AntherError
from models import assets
from models.adapter import shapes
from models.base import load
from privacy.storage import Files
from protocol.codec import largest
from server import checkpoint
from server.federation import federate
from server.gate import Gated
from server.ledger import Ledger
from server.runs import end, refuse, run_folder
from server.state import Round
from server.superlink import tell_largest_adapter
from strategies.build import build
from strategies.clock import WallClock
from strategies.full_plan import training_plan

log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the run configuration's `overrides`, then have every device personalise.

    `resume=true` continues the newest run of the same configuration. ANTHER_TEST=true makes it a test: updates made
    with reproducible noise are accepted, and nothing of the run is a private release.
    """
    _log_as_flower_does()
    folders = assets.home() / "runs"
    try:
        _federate(grid, context, folders)
    except AntherError as error:  # what a person has to mend, no other try will
        refuse(folders, context.run_id, str(error))
        raise


def _federate(grid: Grid, context: Context, folders: Path) -> None:
    overrides = str(context.run_config.get("overrides", ""))
    config = compose(overrides)
    base = load(config.base.path, sites=config.adapter.sites, weights=config.base.weights)
    folder = run_folder(overrides, folders)
    plan = training_plan(config, run=folder.name, base=base.hash)
    test = os.environ.get("ANTHER_TEST") == "true"
    ledger = Ledger(Files(folder))
    strategy = build(config, plan, base.sites, accept_simulated=test, ledger=ledger, base=base)
    saved = checkpoint.load(folder / "checkpoints", sites=base.sites)
    tell_largest_adapter(most := largest(shapes(base.sites, plan.rank)))
    log.info("run %s in %s, from round %d", plan.run, folder, saved.round + 1 if saved else 0)
    state = federate(
        config,
        grid=Gated(grid, largest=most),
        strategy=strategy,
        plan=plan,
        saved=saved,
        checkpoints=folder / "checkpoints",
        on_round=_tell,
        present=config.fleet.sample or 1,
        waits=True,
        clock=WallClock(),
    )
    best = state.best_round
    end(folder)
    log.info("done: best round %d; python -m server.results %s writes its adapter and all about it", best, folder)


def _log_as_flower_does() -> None:
    """Through Flower's handlers: `flwr run --stream` shows what they get."""
    for room in ("server", "strategies"):
        logger = logging.getLogger(room)
        logger.setLevel(logging.INFO)
        for handler in logging.getLogger("flwr").handlers:
            logger.addHandler(handler)


def _tell(done: Round) -> None:
    train, validation = done.train, done.validation
    replied = f"{train.replied} of {train.asked} replied, " if train else ""
    if train and (refused := train.dropped.get("refused")):
        replied += f"{refused} refused, "
    loss = "no losses" if validation.shared is None else f"base {validation.base:.5f}, shared {validation.shared:.5f}"
    if validation.gain is not None:
        loss = f"gain {validation.gain:.5f} ± {validation.gain_error:.5f} by its noise"
    promised = "".join(f", {guarantee}" for guarantee in done.guarantees)
    log.info("round %d: %s%s, %.1f s%s", done.number, replied, loss, done.wall_seconds, promised)
