"""Write the results of a run of real devices:  anther results [FOLDER]

Writes the shared adapter for diffusers and other tools, `summary.json` and `report.html` into the run's folder
(default: the newest of ANTHER_HOME/runs), from its last checkpoint, after the run or while it is in progress. `anther
serve` does this at the end of a run, in a separate process, because Flower doesn't include a page's template in the
bundle that a ServerApp runs from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from common import atomic_files
from common.errors import REPORTED_ERRORS, AntherError, describe_error
from common.plugins import allow_installed_plugins
from conf.components import as_settings
from conf.compose import compose_stored_federation
from conf.schemas.federation import FederationConfig
from models.base.base import Base, load
from models.export import adapter_files
from models.files import assets
from server.report import totals
from server.report.page import Report, write
from server.report.snippet import loading_snippet
from server.rounds import checkpoint
from server.rounds.state import RunState
from server.supervisor import run_dirs
from strategies.download import encode_download

DONE, USAGE = 0, 2
SECRET = (
    "Each device was asked with a secret probability, and ε relies on it. Costs of single devices and rounds would "
    "reveal which devices were asked, so only sums over the whole run are shown. The server's checkpoints, ledger and "
    "metrics.jsonl contain more: don't publish them."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status: USAGE, with one line on standard error, if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="anther results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="the run's folder (default: the newest)")
    options = parser.parse_args(arguments)
    try:
        print(write_run_results(options.folder or _newest()))
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return USAGE
    return DONE


def write_run_results(folder: Path) -> Path:
    """Write all results of the run in this folder, and return the path of the page.

    Raises:
        AntherError: there is no run, or it is damaged.
    """
    arguments = run_dirs.read_overrides(folder)
    config = compose_stored_federation(arguments)
    allow_installed_plugins()
    base = load(config.base.path, sites=config.adapter.sites)
    state = checkpoint.load(folder / "checkpoints", sites=base.sites)
    if state is None:
        raise AntherError(f"{folder}: no round of this run is complete yet: wait for one")
    return write_results(config, folder, base, state, arguments=arguments, test=os.environ.get("ANTHER_TEST") == "true")


def _newest() -> Path:
    runs = assets.home() / "runs"
    if not (folders := sorted(runs.glob("*/"))):
        raise AntherError(f"{runs}: contains no run yet: name a run's folder, or start anther serve")
    return folders[-1]


def write_results(
    config: FederationConfig, folder: Path, base: Base, state: RunState, *, arguments: str, test: bool
) -> Path:
    """Write all results, and return the path of the page.

    Args:
        config: configuration of the run.
        folder: folder of the run.
        base: base that the adapters were trained on.
        state: state after the last round.
        arguments: arguments of the run's server.
        test: whether devices used reproducible noise, so that nothing is a release.
    """
    shared = encode_download(
        state.best_adapter, config.compression.download
    ).adapter  # the version that devices received
    adapter_files.write(folder / "adapters", "shared", shared, base, "shared")
    summary = {
        "rounds": state.round,
        "best_round": state.best_round,
        "clients": sum(metrics.rounds > 0 for metrics in state.devices.values()),
        "loss": totals.validation_losses(state),
        **totals.run_totals(state.history),
        "seconds": sum(record.wall_seconds for record in state.history),
        "test": test,
    }
    atomic_files.write(folder / "summary.json", json.dumps(summary, indent=2).encode())
    page = folder / "report.html"
    secret = config.cohort.sampling_rate is not None and config.privacy.of_devices
    device_stats = {} if secret else state.devices
    devices = [totals.device_row(name, "", metrics, {}) for name, metrics in sorted(device_stats.items())]
    write(
        Report(
            title=f"{summary['clients']} {'device' if summary['clients'] == 1 else 'devices'} trained together",
            command=run_dirs.read_command(folder) or f"anther serve {arguments}",
            config_yaml=yaml.safe_dump(as_settings(config), sort_keys=False),
            summary=summary,
            rounds=totals.round_rows(state.history, secret=secret),
            devices=devices,
            use=loading_snippet(base, folder / "adapters"),
            strategy=config.aggregation.name,
            letters=False,
            quality="as reported by the devices",
            test=test,
            footer=f"Run {folder.name}",
            hidden=SECRET if secret else "",
        ),
        page,
    )
    return page


if __name__ == "__main__":
    sys.exit(main())
