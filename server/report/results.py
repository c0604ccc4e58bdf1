"""What a run of real devices came to:  anther results [FOLDER]

Writes into the run's folder (the newest of ANTHER_HOME/runs) its shared adapter, as diffusers and other tools read it,
`summary.json` and `report.html`, from its last checkpoint: at its end, or while it is at work. `anther serve`
does so at the end. A process of its own, because Flower lets no page's template into the bundle that a ServerApp runs
from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from common import atomic_files
from common.errors import REPORTED_ERRORS, AntherError, told
from conf.compose import compose
from conf.schemas.simulation import SimulationConfig
from models.base import assets
from models.base.base import Base, load
from models.export import adapter_files
from server.report import totals
from server.report.page import Report, write
from server.report.snippet import loading_snippet
from server.rounds import checkpoint
from server.rounds.state import RunState
from server.supervisor import run_dirs
from strategies.download import download

DONE, USAGE = 0, 2
SECRET = (
    "Each device was asked with a secret probability, and ε counts on that: what single devices and rounds cost would "
    "tell who was asked, so only sums over the whole run are shown. The server's own checkpoints, ledger and "
    "metrics.jsonl hold more: don't publish them."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: USAGE with one line on standard error where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="anther results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="of the run; default: the newest")
    asked = parser.parse_args(arguments)
    try:
        print(of_run(asked.folder or _newest()))
    except REPORTED_ERRORS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return USAGE
    return DONE


def of_run(folder: Path) -> Path:
    """Write everything about the run in this folder; the page. AntherError if there is none, or it is damaged."""
    words = run_dirs.read_overrides(folder)
    config = compose(words)
    base = load(config.base.path, sites=config.adapter.sites)
    state = checkpoint.load(folder / "checkpoints", sites=base.sites)
    if state is None:
        raise AntherError(f"{folder}: no round of this run is over yet: wait for one")
    return write_results(config, folder, base, state, words=words, test=os.environ.get("ANTHER_TEST") == "true")


def _newest() -> Path:
    folders = assets.home() / "runs"
    if not (found := sorted(folders.glob("*/"))):
        raise AntherError(f"{folders}: holds no run yet: name a run's folder, or start anther serve")
    return found[-1]


def write_results(
    config: SimulationConfig, folder: Path, base: Base, state: RunState, *, words: str, test: bool
) -> Path:
    """Write everything; the page.

    Args:
        words: that the server was started with.
        test: devices made noise that can be made again, so that nothing is a release.
    """
    shared = download(state.best_adapter, config.compression.download).adapter  # what devices have of it
    adapter_files.write(folder / "adapters", "shared", shared, base, "shared")
    summary = {
        "rounds": state.round,
        "best_round": state.best_round,
        "clients": sum(facts.rounds > 0 for facts in state.devices.values()),
        "loss": totals.validation_losses(state),
        **totals.run_totals(state.history),
        "seconds": sum(record.wall_seconds for record in state.history),
        "test": test,
    }
    atomic_files.write(folder / "summary.json", json.dumps(summary, indent=2).encode())
    page = folder / "report.html"
    secret = config.cohort.sampling_rate is not None and config.privacy.of_devices
    known = {} if secret else state.devices
    devices = [totals.device_row(name, "", facts, {}) for name, facts in sorted(known.items())]
    write(
        Report(
            title=f"{summary['clients']} {'device' if summary['clients'] == 1 else 'devices'} learned together",
            command=run_dirs.read_command(folder) or f"anther serve {words}",
            config_yaml=yaml.safe_dump(dataclasses.asdict(config), sort_keys=False),
            summary=summary,
            rounds=totals.rows(state.history, secret=secret),
            devices=devices,
            use=loading_snippet(base, folder / "adapters"),
            strategy=config.aggregation.name,
            letters=False,
            quality="as devices tell it",
            test=test,
            footer=f"Run {folder.name}",
            hidden=SECRET if secret else "",
        ),
        page,
    )
    return page


if __name__ == "__main__":
    sys.exit(main())
