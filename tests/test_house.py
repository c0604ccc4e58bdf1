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
}
ARROWS = {
    ("typefaces", "models"),
    ("bench", "simulations"),  # it measures what they cost
    ("protocol", "conf"),  # conf.errors: the one exception that a person is meant to read
}
NOT_ON_A_DEVICE = {"server", "strategies", "simulations", "typefaces", "bench"}
DEVICE = {"client", "training", "models", "privacy", "protocol", "conf"}  # what runs on one
FLOWER = {
    "client/app.py",
    "client/node.py",  # its SuperNode, and our ClientApp in place of the one that a server sends
    "server/app.py",
    "server/loop.py",
    "server/federation.py",  # the round loop's whole run
    "server/collect.py",  # what comes back of it
    "server/legs.py",
    "server/buffered.py",
    "server/gate.py",  # around Flower's own grid
    "server/forwarding.py",
    "server/patience.py",
    "server/runtime_grid.py",  # that grid, call by call
    "server/arrivals.py",
    "server/inquiries.py",
    "server/control.py",  # of a SuperLink
    "server/gateway/calls.py",  # Flower's fleet protocol, as a table
    "server/gateway/conversations.py",
    "server/gateway/fleet.py",
    "server/gateway/replies.py",
    "server/local_superlink.py",  # its command, with a socket of ours
    "strategies/federated.py",
    "strategies/roster.py",
    "protocol/records.py",
    "simulations/grid.py",
    "simulations/timed.py",  # the same with time
    "simulations/ray.py",  # another grid: Flower's own simulation
    "bench/ray_recipe.py",  # the peer is Flower's own recipe
    "bench/malice.py",  # an attacker writes Flower's records
    "bench/ingress.py",
    "bench/fleet_attacks.py",  # an attacker writes Flower's fleet protocol
    "bench/invariants.py",
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
        ("models/base.py", "import training"),
        ("models/base.py", "def f():\n    from server.report import report"),
        ("models/base.py", "from privacy import noise"),
        ("models/base.py", "import typefaces.dataset"),
        ("conf/schemas.py", "from protocol.messages import Train"),
        ("client/logic.py", "from strategies.planning import plan"),
        ("client/logic.py", "from server import loop"),
        ("training/trainer.py", "from typefaces import judge"),
        ("client/logic.py", "import flwr"),
        ("server/report/report.py", "from flwr.app import Message"),
        ("server/loop.py", "from . import state"),
        ("simulations/run.py", "import bench"),
        ("models/base.py", "from bench.tiny import base"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("client/app.py", "import flwr.app"),
        ("simulations/run.py", "from typefaces import judge"),
        ("server/loop.py", "from strategies.federated import Federated"),
        ("typefaces/judge.py", "from models.base import Base"),
        ("bench/gain.py", "import bench.common"),
        ("bench/gain.py", "from simulations.grid import CohortGrid"),
        ("models/base.py", "import torch"),
    ],
)
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert violations(path, source) == []
