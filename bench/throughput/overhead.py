"""Latency of a request phase and memory of an idle device, compared with plain Flower.

    anther bench overhead

Training is trivial. The comparison runs Flower's own SuperLink, SuperNodes and `flwr-clientapp` on the same machine,
with TLS and keys, the same number of nodes and messages of the same size, and a ClientApp that echoes its message. A
leg lasts from handing messages to the grid until the last reply is received.

Memory is the proportional set size (PSS) of all processes of one device, idle after the rounds and at its peak in
training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.reliability.processes import LOOPBACK, LocalFederation, federation, free_port, write_letter_folders
from common.flower import environment
from server.supervisor.control import ControlClient
from server.supervisor.server_dir import ServerDir
from server.supervisor.superlink import SuperLinkProcess

OUT = Path("bench/results/overhead.json")
MAX_LEG_SECONDS, MAX_ADDED_MIB = 4.0, 40.0  # limits: seconds of a leg, MiB added to Flower's idle memory
RUN = (
    "aggregation=fedit cohort.size={nodes} adapter.shared.steps=1 adapter.shared.batch_size=1 adapter.personal.steps=1 "
    "evaluation.timesteps=1 round_loop.timeout=600"
)

SERVER_APP = """
import json, time
from pathlib import Path
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    nodes, rounds, size, out = (context.run_config[key] for key in ("nodes", "rounds", "size", "out"))
    while len(found := list(grid.get_node_ids())) < nodes:
        time.sleep(0.5)
    legs = []
    for number in range(rounds):
        data = bytes([number % 256]) * size
        arrays = ArrayRecord({"a": Array("uint8", (size,), "numpy.ndarray", data)})
        began = time.perf_counter()
        replies = list(grid.send_and_receive([Message(RecordDict({"a": arrays}), node, "train") for node in found]))
        legs.append(time.perf_counter() - began)
        assert len(replies) == nodes and not any(reply.has_error() for reply in replies), replies
        Path(out).write_text(json.dumps(legs))
"""
CLIENT_APP = """
from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
"""
PROJECT = """[project]
name = "peer"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "peer"

[tool.flwr.app.components]
serverapp = "peer.server:app"
clientapp = "peer.client:app"

[tool.flwr.app.config]
nodes = 1
rounds = 1
size = 1
out = ""
"""


@dataclass
class DeviceMemory:
    """PSS in MiB of one device's processes."""

    training: float = 0.0
    """Largest sum of all samples."""
    idle: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    """Idle memory by process."""


def pss(processes: Callable[[], list[psutil.Process]]) -> dict[str, float]:
    """Return the PSS in MiB of each running process."""
    mib_of: dict[str, float] = {}
    for process in processes():
        with contextlib.suppress(psutil.Error):
            words = [word for word in process.cmdline() if not word.startswith("-")]
            name = next((Path(w).name for w in words if "flower-" in w or "flwr-" in w or w.startswith("client.")), "?")
            mib_of[f"{name} {process.pid}"] = process.memory_full_info().pss / 2**20
    return mib_of


@contextlib.contextmanager
def track_peak(processes: Callable[[], list[psutil.Process]], memory: DeviceMemory) -> Iterator[None]:
    """Record the largest total memory of the processes, sampled every half second."""
    end = threading.Event()

    def sample() -> None:
        while not end.wait(0.5):
            memory.training = max(memory.training, sum(pss(processes).values()))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def run_flower(folder: Path, nodes: int, rounds: int, size: int, settle: float) -> tuple[list[float], DeviceMemory]:
    """Run plain Flower.

    Args:
        folder: folder for all files.
        nodes: number of SuperNodes.
        rounds: number of rounds.
        size: bytes of each message.
        settle: idle seconds before memory is read.

    Returns:
        Seconds of each leg, and the memory of one node.
    """
    server_dir = ServerDir(folder / "server")
    server_dir.prepare([LOOPBACK], 1)
    superlink = SuperLinkProcess(server_dir.folder, free_port(), server_dir.certificates)
    app, out = folder / "peer-app", folder / "legs.json"
    (app / "peer").mkdir(parents=True)
    for name, text in (("server", SERVER_APP), ("client", CLIENT_APP), ("__init__", "")):
        (app / "peer" / f"{name}.py").write_text(text)
    (app / "pyproject.toml").write_text(PROJECT)
    started: list[subprocess.Popen] = []
    memory = DeviceMemory()
    superlink.start()
    try:
        control = ControlClient(superlink.address, server_dir.certificates.authority)
        for number in range(nodes):
            started.append(_supernode(folder / f"node-{number}", number, superlink, server_dir, control))
        below = _descendants(started[0])
        settings = f'nodes={nodes} rounds={rounds} size={size} out="{out}"'
        response = superlink._flwr("run", str(app), "anther", "--run-config", settings, "--format", "json")
        run = int(response["run-id"])
        with track_peak(below, memory):
            while not control.status(run).startswith("finished"):
                time.sleep(0.5)
        time.sleep(settle)
        memory.parts = pss(below)
        memory.idle = sum(memory.parts.values())
        legs: list[float] = json.loads(out.read_text())
        return legs, memory
    finally:
        for process in started:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
        superlink.stop()


def _supernode(
    home: Path, number: int, superlink: SuperLinkProcess, server_dir: ServerDir, control: ControlClient
) -> subprocess.Popen:
    """Start a SuperNode as in Flower's documentation.

    Args:
        home: folder of the node.
        number: index of the node.
        superlink: the running SuperLink.
        server_dir: folder of the server, with its certificates.
        control: client of the SuperLink's control API.
    """
    home.mkdir()
    key = home / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key), "-C", ""], check=True)
    control.register((home / "key.pub").read_text(), f"node-{number}")
    with (home / "log").open("wb") as log:
        return subprocess.Popen(
            [
                "flower-supernode",
                "--root-certificates",
                str(server_dir.certificates.authority),
                "--superlink",
                superlink.address,
                "--auth-supernode-private-key",
                str(key),
                "--host",
                LOOPBACK,
                "--port",
                str(free_port()),
            ],
            env={**environment(home / "flower"), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"},
            stdout=log,
            stderr=log,
        )


def _descendants(process: subprocess.Popen) -> Callable[[], list[psutil.Process]]:
    root = psutil.Process(process.pid)

    def descendants() -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [root, *root.children(recursive=True)]
        return []

    return descendants


def run_anther(folder: Path, nodes: int, rounds: int, settle: float) -> tuple[list[float], DeviceMemory, int]:
    """Run Anther.

    Args:
        folder: folder for all files.
        nodes: number of devices.
        rounds: number of rounds.
        settle: idle seconds before memory is read.

    Returns:
        Seconds of each leg but those of the first round, the memory of one device, and bytes of an adapter.
    """
    memory = DeviceMemory()
    with federation(folder, f"rounds={rounds + 1} {RUN.format(nodes=nodes)}") as running:
        running.start()
        pictures = write_letter_folders(folder / "pictures", nodes)
        for name, data in pictures.items():
            running.enroll(name, data, f"worker.idle_seconds={settle / 2:g}").start()
        process = next(iter(running.devices.values())).process
        assert process is not None
        below = _descendants(process)
        with track_peak(below, memory):
            while running.server.exit_code is None and running.rounds() < rounds + 1:
                time.sleep(0.5)
        time.sleep(settle)
        memory.parts = pss(below)
        memory.idle = sum(memory.parts.values())
        return _legs(running), memory, _adapter_bytes(running)


def _legs(running: LocalFederation) -> list[float]:
    """Return seconds per leg; a round with evaluation has two legs."""
    state = json.loads(sorted(running.runs[-1].glob("checkpoints/round-*"))[-1].joinpath("state.json").read_text())
    return [record["wall_seconds"] / 2 for record in state["history"][2:]]  # the first round loads the base


def _adapter_bytes(running: LocalFederation) -> int:
    return sorted(running.runs[-1].glob("checkpoints/round-*"))[-1].joinpath("adapter.safetensors").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--settle", type=float, default=20.0, help="idle seconds before memory is read")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anther-") as folder:
        legs, memory, size = run_anther(Path(folder) / "ours", args.nodes, args.rounds, args.settle)
        flower_legs, flower_memory = run_flower(Path(folder) / "flower", args.nodes, args.rounds, size, args.settle)
    record: dict[str, Any] = {
        "command": " ".join(["python -m bench.throughput.overhead", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "versions": versions("flwr", "torch"),
        "load": os.getloadavg()[0],
        "bytes": size,
        "anther": {"legs": legs, **vars(memory)},
        "flower": {"legs": flower_legs, **vars(flower_memory)},
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    Console(width=110).print(table(record))


def table(record: dict[str, Any]) -> Table:
    """Return a table with the median leg and the memory of one device."""
    shown = Table(title=f"one leg of {record['bytes'] / 1e6:.2f} MB, and the memory of one device")
    for heading in ("", "leg, s (median)", "worst", "idle, MiB", "while training, MiB"):
        shown.add_column(heading, justify="right")
    for name in ("anther", "flower"):
        results = record[name]
        shown.add_row(
            name,
            f"{median(results['legs']):.2f}",
            f"{max(results['legs']):.2f}",
            f"{results['idle']:.0f}",
            f"{results['training']:.0f}",
        )
    added = record["anther"]["idle"] - record["flower"]["idle"]
    quick = median(record["anther"]["legs"]) <= MAX_LEG_SECONDS
    shown.caption = (
        f"leg ≤ {MAX_LEG_SECONDS:g} s: {'yes' if quick else 'no'}; idle {added:+.0f} MiB (≤ +{MAX_ADDED_MIB:g})"
    )
    return shown


if __name__ == "__main__":
    main()
