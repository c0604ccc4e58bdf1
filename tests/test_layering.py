"""The house rule: imports run downwards only, Flower stays in a named list of modules, a device knows no server."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "anther": 7,
    "simulations": 6,
    "bench": 6,
    "server": 5,
    "client": 5,
    "strategies": 4,
    "training": 3,
    "models": 2,
    "privacy": 2,
    "typefaces": 2,
    "protocol": 1,
    "conf": 1,
    "common": 0,
    "tools": 8,
}
ARROWS = {
    ("typefaces", "models"),
    ("bench", "simulations"),  # it measures what they cost
}
NOT_ON_A_DEVICE = {"server", "strategies", "simulations", "typefaces", "bench"}
DEVICE = {"client", "training", "models", "privacy", "protocol", "conf", "common"}  # what runs on one
FLOWER = {
    "client/app.py",
    "client/runtime/supernode.py",  # its SuperNode, and our ClientApp in place of the one that a server sends
    "server/app.py",
    "server/rounds/loop.py",
    "server/rounds/federation.py",  # the round loop's whole run
    "server/rounds/collect.py",  # what comes back of it
    "server/rounds/sync.py",
    "server/rounds/fedbuff.py",
    "server/grid/validating_grid.py",  # around Flower's own grid
    "server/grid/forwarding.py",
    "server/rounds/patience.py",
    "server/grid/runtime_grid.py",  # that grid, call by call
    "server/grid/incoming_replies.py",
    "server/grid/pending_queries.py",
    "server/supervisor/control.py",  # of a SuperLink
    "server/gateway/calls.py",  # Flower's fleet protocol, as a table
    "server/gateway/exchange.py",
    "server/gateway/fleet.py",
    "server/gateway/replies.py",
    "server/supervisor/local_superlink.py",  # its command, with a socket of ours
    "strategies/strategy.py",
    "strategies/round/connected_devices.py",
    "protocol/records.py",
    "simulations/grid/cohort.py",
    "simulations/grid/timed.py",  # the same with time
    "simulations/grid/ray.py",  # another grid: Flower's own simulation
    "bench/throughput/ray_recipe.py",  # the peer is Flower's own recipe
    "bench/robustness/attack_corpus.py",  # an attacker writes Flower's records
    "bench/robustness/ingress.py",
    "bench/robustness/fleet_attacks.py",  # an attacker writes Flower's fleet protocol
    "bench/robustness/invariants.py",
}


def imported(source: str) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "" if not node.level else "." * node.level


def violations(path: str, source: str) -> list[str]:
    """What a file, named relative to the root, imports against the rule."""
    room, found = path.split("/")[0], []
    for module in imported(source):
        other = module.split(".")[0]
        if module.startswith("."):
            found.append(f"{path}: relative import; name the room")
        elif other == "tests" or (other == "bench" and room != "bench"):
            found.append(f"{path}: nothing imports {other}")
        elif other == "flwr" and path not in FLOWER:
            found.append(f"{path}: imports flwr, which belongs in {', '.join(sorted(FLOWER))}")
        elif other in FLOORS and other != room:
            above = FLOORS[other] > FLOORS[room]
            beside = FLOORS[other] == FLOORS[room] and (room, other) not in ARROWS
            if above or beside:
                found.append(f"{path}: {room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})")
            elif room in DEVICE and other in NOT_ON_A_DEVICE:
                found.append(f"{path}: runs on a device, and imports {other}")
    return found


def test_every_import_keeps_the_rule() -> None:
    files = [path for room in FLOORS for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 30, "the rooms are elsewhere"
    assert [
        line
        for path in files
        for line in violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ] == []


def test_every_package_is_a_room() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - set(FLOORS) == set()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/base/base.py", "import training"),
        ("models/base/base.py", "def f():\n    from server.report import page"),
        ("models/base/base.py", "from privacy import noise"),
        ("models/base/base.py", "import typefaces.dataset"),
        ("conf/schemas/simulation.py", "from protocol.messages import Train"),
        ("client/rounds/handler.py", "from strategies.planning.plan import plan"),
        ("client/rounds/handler.py", "from server.rounds import loop"),
        ("training/cohort.py", "from typefaces import judge"),
        ("client/rounds/handler.py", "import flwr"),
        ("server/report/page.py", "from flwr.app import Message"),
        ("server/rounds/loop.py", "from . import state"),
        ("simulations/run.py", "import bench"),
        ("models/base/base.py", "from bench.lib.tiny import base"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("client/app.py", "import flwr.app"),
        ("simulations/run.py", "from typefaces import judge"),
        ("server/rounds/loop.py", "from strategies.strategy import Federated"),
        ("typefaces/judge.py", "from models.base.base import Base"),
        ("bench/gain.py", "import bench.common"),
        ("bench/gain.py", "from simulations.grid.cohort import CohortGrid"),
        ("models/base/base.py", "import torch"),
    ],
)
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert violations(path, source) == []
