"""Refuse `python -m` with the former module of a command; the message names the present command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

from common.errors import AntherError

MOVED = {
    "bench.aarch64": "anther bench aarch64",
    "bench.aggregation": "anther bench aggregation",
    "bench.cohort": "anther bench cohort",
    "bench.faults": "anther bench faults",
    "bench.federation": "anther bench federation",
    "bench.fleet_attacks": "anther bench fleet_attacks",
    "bench.fuzz_inputs": "anther bench fuzz_inputs",
    "bench.gate": "anther bench gate",
    "bench.gateway": "anther bench gateway",
    "bench.grid": "anther bench grid",
    "bench.lean": "anther bench lean",
    "bench.limits": "anther bench limits",
    "bench.membership": "anther bench membership",
    "bench.mutations": "anther bench mutations",
    "bench.overhead": "anther bench overhead",
    "bench.pictures": "anther bench pictures",
    "bench.planning": "anther bench planning",
    "bench.predicted": "anther bench predicted",
    "bench.private_cost": "anther bench private_cost",
    "bench.quality": "anther bench quantization",
    "bench.ray_recipe": "anther bench ray_recipe",
    "bench.recipes": "anther bench recipes",
    "bench.rest": "anther bench weights_memory",
    "bench.robustness": "anther bench byzantine",
    "bench.soak": "anther bench soak",
    "bench.strategies": "anther bench strategies",
    "bench.traffic": "anther bench traffic",
    "bench.two_steps": "anther bench dp_smoke",
    "bench.utility": "anther bench utility",
    "client.benchmark": "anther device benchmark",
    "client.draw": "anther device draw",
    "client.enroll": "anther device enroll",
    "client.forget": "anther device forget",
    "client.leave": "anther device leave",
    "client.ledger": "anther device ledger",
    "client.plan": "anther plan",
    "client.roll_back": "anther device roll-back",
    "client.run": "anther device run",
    "models.assets": "anther assets",
    "models.fuse": "anther fuse",
    "models.pack": "anther pack",
    "server.keys": "anther keys",
    "server.results": "anther results",
    "server.run": "anther serve",
    "simulations.audit": "anther audit",
    "strategies.table": "python -m tools.privacy_page",
    "typefaces.find_frame": "python -m typefaces.find_bases",
}
"""Former module → present command."""


def refuse_key_value(arguments: Sequence[str], keys: Sequence[str], usage: str) -> None:
    """Refuse `key=value` where a command takes options now.

    Args:
        arguments: words of the command line.
        keys: keys that the command took before.
        usage: how to call the command now.

    Raises:
        AntherError: one line with the present usage.
    """
    for argument in arguments:
        if argument.partition("=")[0] in keys and "=" in argument:
            raise AntherError(f"{argument}: write {usage}")


class MovedCommandFinder(MetaPathFinder):
    """Last finder of `sys.meta_path`: consulted only for modules that don't exist."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """End the process if `python -m` asked for a former command; `import` is unchanged."""
        del path, target
        module = fullname.removesuffix(".__main__")  # the suffix is added if a package now has the former name
        if sys.argv[:1] == ["-m"] and module in MOVED:  # the value while `python -m` searches for its module
            print(f"error: python -m {module}: moved to {MOVED[module]}", file=sys.stderr)
            sys.exit(2)


def install() -> None:
    """Install the finder; the packages that held commands call it."""
    if not any(isinstance(finder, MovedCommandFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedCommandFinder())
