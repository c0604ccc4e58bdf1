"""What a finished run of real devices leaves beside its checkpoints: the shared adapter, summary.json, report.html."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import yaml

from conf.schemas import Simulation
from models.base import Base
from models.export import export
from privacy import durable
from server.report import sums
from server.report.report import Report, write
from server.state import State
from strategies.download import download


def finish(config: Simulation, folder: Path, base: Base, state: State, *, words: str, test: bool) -> Path:
    """Write everything; the page.

    Args:
        words: that the server was started with.
        test: devices made noise that can be made again, so that nothing is a release.
    """
    shared = download(state.best_adapter, config.strategy.download).adapter  # what devices have of it
    note = {"anther_base": base.hash, **{f"anther_{key}": value for key, value in base.notes.items()}}
    export(shared, folder / "adapters" / "shared.safetensors", family=base.family, sites=base.sites, metadata=note)
    summary = {
        "rounds": state.round,
        "best_round": state.best_round,
        "clients": sum(facts.rounds > 0 for facts in state.devices.values()),
        "loss": sums.validated(state),
        **sums.summed(state.history),
        "seconds": sum(record.wall_seconds for record in state.history),
        "test": test,
    }
    durable.write(folder / "summary.json", json.dumps(summary, indent=2).encode())
    page = folder / "report.html"
    devices = [sums.device_row(name, "", facts, {}) for name, facts in sorted(state.devices.items())]
    write(
        Report(
            title=f"{summary['clients']} {'device' if summary['clients'] == 1 else 'devices'} learned together",
            command=f"python -m server.run {words}",
            config_yaml=yaml.safe_dump(dataclasses.asdict(config), sort_keys=False),
            summary=summary, rounds=sums.rows(state.history), devices=devices, base=config.base.path,
            quality="as devices tell it", test=test, footer=f"Run {folder.name}",
        ),
        page,
    )  # fmt: skip
    return page
