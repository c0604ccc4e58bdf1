"""Layering: imports run downwards without cycles, Flower stays in listed modules, devices import no server code."""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
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
SAME_LAYER_IMPORTS = {
    ("typefaces", "models"),
    ("bench", "simulations"),  # measures simulations
}
SERVER_ONLY = {"server", "strategies", "simulations", "typefaces", "bench"}
ON_DEVICE = {"client", "training", "models", "privacy", "protocol", "conf", "common"}  # packages that run on a device
KNOW_SIMULATIONS = {"simulations", "bench", "anther", "tools", "conf"}
SIMULATED = {"conf.schemas.simulation", "conf.schemas.fleet"}  # simulated devices and writers
COMPOSITION = {"conf.compose", "conf.schemas.federation", "conf.schemas.server", "hydra"}  # not on a device
CONFIGURATIONS = {"FederationConfig", "SimulationConfig", "ServeConfig"}
WHOLE_CONFIGURATION = {  # modules of a simulation that get all keys; every other gets the values that it uses
    "simulations.checks",
    "simulations.run",
    "simulations.run_dir",
    "simulations.setup",
    "simulations.fleet.participants",
    "simulations.grid.build",
    "simulations.report.results",
    "simulations.report.run_work",
    "server.rounds.federation",
    "strategies.factory.aggregation",
    "strategies.factory.combination",
    "strategies.factory.full_plan",
    "strategies.factory.personalization",
    "strategies.factory.planning",
    "strategies.factory.selection",
    "strategies.factory.strategy",
    "strategies.round.private_evaluation",
}
ELSEWHERE = {  # only with grid=ray, on a server, in an audit, or in a program that composes
    "conf.compose",
    "server.report.results",
    "server.supervisor.run",
    "simulations.audit.membership",
    "simulations.grid.ray",
}
FLOWER_MODULES = {
    "client/runtime/client_app.py",
    "client/runtime/supernode.py",  # SuperNode with our ClientApp instead of the server's
    "server/app.py",
    "server/rounds/loop.py",
    "server/rounds/federation.py",  # whole federation over a grid
    "server/rounds/collect.py",  # replies of a grid
    "server/rounds/sync.py",
    "server/rounds/fedbuff.py",
    "server/grid/validating_grid.py",  # wraps Flower's own grid
    "server/grid/forwarding.py",
    "server/rounds/patience.py",
    "server/grid/runtime_grid.py",  # Flower's own grid with deadlines for each call
    "server/grid/incoming_replies.py",
    "server/grid/pending_queries.py",
    "server/supervisor/control.py",  # control API of a SuperLink
    "server/gateway/calls.py",  # Flower's fleet protocol, as a table
    "server/gateway/exchange.py",
    "server/gateway/fleet.py",
    "server/gateway/replies.py",
    "server/supervisor/local_superlink.py",  # SuperLink on a socket of ours
    "strategies/strategy.py",
    "strategies/cohort.py",
    "strategies/costs.py",
    "strategies/flower_strategy.py",
    "strategies/phases/evaluation.py",
    "strategies/phases/personalization.py",
    "strategies/phases/training.py",
    "strategies/round/messages.py",
    "strategies/round/connected_devices.py",
    "protocol/records.py",
    "simulations/grid/cohort.py",
    "simulations/grid/timed.py",  # on a virtual clock
    "simulations/grid/ray.py",  # Flower's own simulation
    "bench/throughput/ray_recipe.py",  # compares with Flower's own recipe
    "bench/robustness/attack_corpus.py",  # an attacker writes Flower's records
    "bench/robustness/ingress.py",
    "bench/robustness/fleet_attacks.py",  # an attacker writes Flower's fleet protocol
    "bench/robustness/invariants.py",
}


def imported(source: str) -> Iterator[str]:
    """Yield every module that a file imports, at the top level or in a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "" if not node.level else "." * node.level


def violations(path: str, source: str) -> list[str]:
    """List the violations of a file, whose path is relative to the root."""
    package, messages = path.split("/")[0], []
    for module in imported(source):
        other = module.split(".")[0]
        if module.startswith("."):
            messages.append(f"{path}: relative import; name the package")
        elif other == "tests" or (other == "bench" and package != "bench"):
            messages.append(f"{path}: nothing imports {other}")
        elif other == "flwr" and path not in FLOWER_MODULES:
            messages.append(f"{path}: imports flwr, which belongs in {', '.join(sorted(FLOWER_MODULES))}")
        elif module in SIMULATED and package not in KNOW_SIMULATIONS:
            messages.append(f"{path}: only simulations take {module}; take a FederationConfig")
        elif COMPOSITION & {module, other} and package in ON_DEVICE - {"conf"}:
            messages.append(f"{path}: runs on a device, which composes nothing that a server sends")
        elif other in LAYERS and other != package:
            above = LAYERS[other] > LAYERS[package]
            beside = LAYERS[other] == LAYERS[package] and (package, other) not in SAME_LAYER_IMPORTS
            if above or beside:
                messages.append(f"{path}: {package} (layer {LAYERS[package]}) imports {other} (layer {LAYERS[other]})")
            elif package in ON_DEVICE and other in SERVER_ONLY:
                messages.append(f"{path}: runs on a device, and imports {other}")
    return messages


@pytest.mark.integration
def test_no_import_violates_the_layers() -> None:
    files = [path for package in LAYERS for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 30, "the packages are elsewhere"
    assert [
        line
        for path in files
        for line in violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ] == []


@cache
def modules() -> dict[str, ast.Module]:
    """Parse every module of every package, by its dotted name."""
    files = [path.relative_to(ROOT) for package in LAYERS for path in (ROOT / package).rglob("*.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    return {name: ast.parse((ROOT / path).read_text(encoding="utf-8")) for name, path in zip(names, files, strict=True)}


def dependencies(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return the modules among `trees` that each of them imports, at the top level or in a function."""
    graph: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= submodules & trees.keys() or {node.module}
        graph[name] = graph[name] & trees.keys() - {name}
    return graph


def take_configuration(trees: Mapping[str, ast.Module]) -> set[str]:
    """Return the modules with a function, or a field of a class, that is given a whole configuration."""
    return {
        name
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation
        if any(isinstance(part, ast.Name) and part.id in CONFIGURATIONS for part in ast.walk(node.annotation))
    }


@pytest.mark.integration
def test_few_modules_take_the_whole_configuration() -> None:
    found = take_configuration({name: tree for name, tree in modules().items() if not name.startswith("bench.")})
    assert found == WHOLE_CONFIGURATION | ELSEWHERE


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        ("def f(config: SimulationConfig): ...", True),
        ("def f(words: list[str], *, config: FederationConfig | None = None): ...", True),
        ("class A:\n    config: ServeConfig", True),
        ("def f(settings: FleetConfig) -> SimulationConfig: ...", False),
    ],
)
def test_configuration_as_an_argument_is_found(source: str, takes: bool) -> None:
    assert take_configuration({"a": ast.parse(source)}) == ({"a"} if takes else set())


@pytest.mark.integration
def test_modules_have_no_import_cycle() -> None:
    TopologicalSorter(dependencies(modules())).prepare()


def test_planted_cycle_is_found() -> None:
    sources = {"a.x": "from a import y", "a.y": "def f():\n    import b.z", "b.z": "from a.x import f"}
    with pytest.raises(CycleError):
        TopologicalSorter(dependencies({name: ast.parse(source) for name, source in sources.items()})).prepare()


def test_every_package_has_a_layer() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - set(LAYERS) == set()


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
        ("strategies/factory/combination.py", "from conf.schemas.simulation import SimulationConfig"),
        ("server/app.py", "def f():\n    from conf.schemas.fleet import FleetConfig"),
        ("client/rounds/train.py", "from conf.compose import compose"),
        ("client/runtime/worker.py", "import hydra.core.hydra_config"),
        ("client/rounds/handler.py", "import flwr"),
        ("server/report/page.py", "from flwr.app import Message"),
        ("server/rounds/loop.py", "from . import state"),
        ("simulations/run.py", "import bench"),
        ("models/base/base.py", "from bench.lib.tiny import base"),
    ],
)
def test_planted_violation_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("client/runtime/client_app.py", "import flwr.app"),
        ("simulations/run.py", "from typefaces import judge"),
        ("server/rounds/loop.py", "from strategies.strategy import FederatedStrategy"),
        ("typefaces/judge.py", "from models.base.base import Base"),
        ("bench/gain.py", "import bench.common"),
        ("bench/gain.py", "from simulations.grid.cohort import CohortGrid"),
        ("models/base/base.py", "import torch"),
        ("strategies/factory/combination.py", "from conf.schemas.federation import FederationConfig"),
        ("simulations/run.py", "from conf.schemas.simulation import SimulationConfig"),
        ("client/device.py", "from conf.schemas.node import compose"),
    ],
)
def test_allowed_import_is_not_found(path: str, source: str) -> None:
    assert violations(path, source) == []


def room(path: str) -> str:
    """Return a file's top-level room: its package and first sub-package, or the file itself at a package's root."""
    parts = path.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 else path.removesuffix(".py")


def room_imports(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Map each room to the rooms of the same package that it imports, from the sources of files by path."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    arrows: dict[str, set[str]] = {room(path): set() for path in sources}
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [name if name in modules else node.module for name in named]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                continue
            for target in targets:
                other = modules.get(target)
                same = other is not None and other.split("/")[0] == path.split("/")[0]
                if same and room(str(other)) != room(path):
                    arrows[room(path)].add(room(str(other)))
    return arrows


@pytest.mark.integration
def test_rooms_of_a_package_have_no_circle() -> None:
    files = [path for package in LAYERS for path in (ROOT / package).rglob("*.py")]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    arrows = room_imports(sources)
    assert len(arrows) > 50
    assert arrows["client/runtime"] >= {"client/rounds", "client/device"}
    TopologicalSorter(arrows).prepare()  # CycleError names the circle


def test_planted_circle_is_found() -> None:
    sources = {
        "models/a/one.py": "from models.b import two",
        "models/b/two.py": "def f():\n    import models.a.one",
    }
    with pytest.raises(CycleError):
        TopologicalSorter(room_imports(sources)).prepare()
