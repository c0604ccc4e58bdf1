"""Commands of `anther`, in groups."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common.errors import AntherError


class Command(NamedTuple):
    """A command, with the module of its `main()`."""

    module: str
    help: str
    schema: str | None = None
    """`module:class` of its configuration, if it takes `key=value`."""
    groups: bool = False
    """Whether it is a Hydra application with groups of options."""


GROUPS: Mapping[str, Mapping[str, Command]] = {
    "Research": {
        "simulate": Command(
            "simulations.run",
            "run a whole federation on this machine, and write a report",
            "conf.schemas.simulation:SimulationConfig",
            groups=True,
        ),
        "audit": Command(
            "simulations.audit.run", "test the privacy guarantees by attacks", "conf.schemas.audit:AuditConfig"
        ),
        "plan": Command("client.cli.plan", "predict how a device can train", "conf.schemas.planning:PlanConfig"),
        "bench": Command("anther.bench", "measure a claim: anther bench NAME"),
    },
    "Server": {
        "serve": Command(
            "server.supervisor.run",
            "run the server of a federation",
            "conf.schemas.server:ServeConfig",
            groups=True,
        ),
        "keys": Command("server.supervisor.keys", "manage tickets and devices: ticket, list, revoke"),
        "results": Command("server.report.results", "write the report of a server's run again"),
    },
    "Device": {
        "device enroll": Command(
            "client.cli.enroll", "join a federation with a ticket", "conf.schemas.node:NodeConfig"
        ),
        "device run": Command(
            "client.runtime.supervisor", "train in the federation until stopped", "conf.schemas.node:NodeConfig"
        ),
        "device doctor": Command("client.cli.check", "check a folder of pictures, file by file"),
        "device status": Command("client.cli.status", "show this device's current work and its history"),
        "device plan": Command("client.cli.plan", "the same as anther plan", "conf.schemas.planning:PlanConfig"),
        "device benchmark": Command("client.cli.benchmark", "measure how fast this device trains"),
        "device ledger": Command("client.cli.ledger", "show every shared update, and the privacy spent"),
        "device draw": Command("client.cli.draw", "draw pictures with the personal adapter"),
        "export": Command("client.cli.export", "write a learned adapter for diffusers, ComfyUI and others"),
        "import": Command("client.cli.import_adapter", "start the personal adapter from a LoRA made elsewhere"),
        "device roll-back": Command("client.cli.roll_back", "restore an earlier personal adapter"),
        "device leave": Command("client.cli.leave", "leave the federation"),
        "device forget": Command("client.cli.forget", "delete the learned adapters"),
    },
    "Files": {
        "pack": Command("models.base.pack", "quantize a base once, for all devices"),
        "fuse": Command("models.export.fuse", "fuse an adapter into its base"),
        "assets": Command(
            "models.files.assets", "copy the built-in base and data to ANTHER_HOME, and show where they are"
        ),
    },
    "Shell": {
        "completion": Command("anther.completion", "print the completion script of bash, zsh or fish"),
    },
}
COMMANDS: Mapping[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}


@cache
def benchmarks() -> Mapping[str, tuple[str, str]]:
    """Find the benchmarks of this checkout: module and summary, by name.

    Raises:
        AntherError: Anther is installed without its benchmarks.
    """
    spec = importlib.util.find_spec("bench")
    if spec is None or not spec.submodule_search_locations:
        raise AntherError("anther bench: benchmarks are not installed; run it in a checkout of the repository")
    root = Path(spec.submodule_search_locations[0])
    by_name = {}
    for file in sorted(root.glob("*/*.py")):
        source = file.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in source:
            summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].rstrip(".")
            by_name[file.stem] = (f"bench.{file.parent.name}.{file.stem}", summary)
    return by_name
