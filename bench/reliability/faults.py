"""Inject real faults into a federation of processes, and check that it recovers.

    anther bench faults [ROW …] [--runs 20]

A federation of three devices runs round after round, with example-level privacy, over TLS with keys. Each run of a row
injects its fault at a random time and then waits. The outcome is *went on* if a later round used an update of every
device again without intervention. It is *refused* if the affected process printed a one-line reason and the other
processes continued. After each run every ledger must be valid, with a sealed entry for every update that the server has
used.

With `--jobs N`, N federations run in parallel, each with its own network and mounts, on one core and 2 GiB each. Runs
are appended to those in the result file: remove the file to start over.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.reliability.network import SERVER, network, set_link
from bench.reliability.processes import (
    LocalFederation,
    ModuleProcess,
    federation,
    kill_all,
    run_module,
    wait_until,
    write_letter_folders,
)
from common.atomic_files import write

OUT = Path("bench/results/faults.json")
DEVICES = 3
RUN = (
    "rounds=5000 aggregation=fedit cohort.size=3 privacy=example privacy.epsilon=8 privacy.delta=1e-3 "
    "adapter.shared.rank=2 adapter.shared.steps=2 evaluation.timesteps=1 round_loop.timeout=90"
)
TIMEOUT = 420.0  # seconds in which a federation must recover
DISK_MIB = 96  # MiB of a device's disk

Fault = Callable[["FaultScene"], "str | None"]
"""Function that injects the fault, and returns the message of the affected process if it refuses."""


@dataclass
class FaultScene:
    """Running federation, and the device that is affected by this run's fault."""

    federation: LocalFederation
    rng: random.Random
    victim: str = ""

    @property
    def device(self) -> ModuleProcess:
        """Process of the affected device."""
        return self.federation.devices[self.victim]

    def server_state(self) -> dict[str, Any]:
        """Read the state in the server's newest checkpoint."""
        newest = sorted(self.federation.runs[-1].glob("checkpoints/round-*"))[-1]
        state: dict[str, Any] = json.loads((newest / "state.json").read_text())
        return state

    def used_rounds(self) -> dict[str, int]:
        """Return the number of rounds that used an update of each device."""
        for _ in range(50):
            with contextlib.suppress(OSError, IndexError, ValueError):  # the checkpoint was just replaced
                return {name: facts["rounds"] for name, facts in self.server_state()["devices"].items()}
            time.sleep(0.1)
        raise AssertionError(f"no checkpoint can be read\n{self.federation.logs()}")

    def process(self, what: str) -> psutil.Process:
        """Wait for a process of this kind, and return one at random."""
        processes: list[psutil.Process] = []

        def look() -> bool:
            processes[:] = self._find(what)
            return bool(processes)

        wait_until(look, 120, f"{what}\n{self.federation.logs()}")
        return self.rng.choice(processes)

    def _find(self, what: str) -> list[psutil.Process]:
        match what:
            case "ClientApp":  # forks of the node's process; the first of them is the SuperNode
                return [
                    child
                    for node in self.device.children("client.runtime.supernode")[:1]
                    for child in _children(node)[1:]
                ]
            case "SuperNode":
                return [
                    child
                    for node in self.device.children("client.runtime.supernode")[:1]
                    for child in _children(node)[:1]
                ]
            case "worker":
                return self.device.children("client.runtime.worker")
            case "SuperLink":
                return self.federation.server.children("server.supervisor.local_superlink")
            case _:
                return [
                    p for p in psutil.process_iter() if _belongs_to(p, self.federation.server.home, "flwr-serverapp")
                ]

    def pause(self, seconds: float) -> None:
        """Sleep for a random time of at most `seconds`."""
        time.sleep(self.rng.uniform(0, seconds))


def kill_process(what: str) -> Fault:
    """Return the fault that kills a process of this kind at a random time."""

    def fault(scene: FaultScene) -> None:
        scene.pause(4)
        process = scene.process(what)
        scene.pause(0.5)
        with contextlib.suppress(psutil.NoSuchProcess):  # it exited by itself: kill the next one
            process.kill()
            return
        scene.process(what).kill()

    return fault


def kill_server(scene: FaultScene) -> None:
    """Kill the whole server, like a power loss of its machine, and start it again like systemd would."""
    scene.pause(4)
    scene.federation.server.kill()
    scene.federation.start()


def kill_device(scene: FaultScene) -> None:
    """Kill a device's supervisor, and start it again."""
    scene.pause(4)
    scene.device.kill()
    time.sleep(1)
    scene.device.start()


def fill_disk(scene: FaultScene) -> None:
    """Fill the device's disk completely for ten seconds of a round."""
    filler = scene.device.home / "filler"
    scene.pause(3)
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    time.sleep(10)
    filler.unlink()


def corrupt_cache(scene: FaultScene) -> None:
    """Change bytes of the cache, and kill the worker so that it reads the cache again."""
    for file in (scene.device.home / "devices" / scene.victim / "cache").glob("*"):
        data = bytearray(file.read_bytes())
        for _ in range(max(1, len(data) // 1000)):
            data[scene.rng.randrange(len(data))] ^= 1 + scene.rng.randrange(255)
        file.write_bytes(data)
    scene.process("worker").kill()


def truncate_checkpoint(scene: FaultScene) -> str | None:
    """Kill the server and truncate a file of its newest checkpoint.

    The server must name the checkpoint, and resume from the previous one.
    """
    federation = scene.federation
    federation.server.kill()
    kill_all(federation.server.home)  # like a power loss: otherwise its ServerApp may finish another round meanwhile
    newest = sorted(federation.runs[-1].glob("checkpoints/round-*"))[-1]
    file = scene.rng.choice([*newest.iterdir()])
    content = file.read_bytes()
    file.write_bytes(content[: scene.rng.randrange(len(content))])
    federation.start()
    wait_until(lambda: str(newest) in federation.server.output, 120, "the name of the damaged checkpoint")
    *_, message = (line for line in federation.server.output.splitlines() if f"delete {newest}" in line)
    federation.server.stop()
    shutil.rmtree(newest)  # as the message asks
    federation.start()
    return message.removeprefix("error: ")


def start_second_node(scene: FaultScene) -> str:
    """Start a second node with the same home."""
    environment = {"ANTHER_HOME": str(scene.device.home)}
    second = ModuleProcess(
        "client.runtime.supervisor",
        scene.device.arguments,
        scene.device.home / "second",
        environment,
        scene.device.command_prefix,
    )
    second.start()
    wait_until(lambda: second.exit_code is not None, 60, f"a refusal\n{second.output}")
    return second.output.strip().splitlines()[-1].removeprefix("error: ")


def replace_server(scene: FaultScene) -> str:
    """Let another server answer at the same address for a while."""
    federation, device = scene.federation, scene.device
    device.stop()
    federation.server.stop()
    other = ModuleProcess(
        "server.supervisor.run", federation.server.arguments, federation.folder / f"other-{scene.rng.random()}", {}
    )
    other.start()
    wait_until(lambda: "listening on" in other.output, 120, other.output)
    offset = len(device.output)
    device.start()
    wait_until(lambda: device.exit_code is not None, 120, f"a refusal\n{device.output}")
    other.stop()
    federation.start()
    device.start()
    return device.output[offset:].split("error: ")[-1].splitlines()[0]


def shift_clock(scene: FaultScene) -> str:
    """Start the device with its clock an hour ahead: it must report that and wait, and continue with the correct
    clock."""
    device, offset = scene.device, len(scene.device.output)
    device.stop()
    device.environment = _shifted_clock()
    device.start()
    wait_until(
        lambda: "clock differs" in device.output[offset:], 240, f"a message on the clock\n{device.output[-2000:]}"
    )
    device.stop()
    device.environment = {}
    device.start()
    return next(line for line in device.output[offset:].splitlines() if "clock differs" in line)


def rotate_certificate(scene: FaultScene) -> None:
    """Rotate the server's key and certificate while the federation runs."""
    scene.pause(4)
    process = run_module("server.supervisor.keys", "rotate", home=scene.federation.server.home)
    assert process.returncode == 0, process.stderr


def cut_network(seconds: float) -> Fault:
    """Take the device's network down from the middle of an upload."""

    def fault(scene: FaultScene) -> None:
        process = scene.process("ClientApp")
        with contextlib.suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
            process.wait(60)  # it exits when its reply is about to be uploaded
        scene.pause(0.3)
        set_link(scene.victim, on=False)
        time.sleep(seconds)
        set_link(scene.victim, on=True)

    return fault


ROWS: dict[str, Fault] = {
    **{
        f"kill -9 {what}": kill_process(what)
        for what in ("ClientApp", "worker", "SuperNode", "SuperLink", "server app")
    },
    "kill -9 server": kill_server,
    "kill -9 device": kill_device,
    "disk full": fill_disk,
    "corrupt cache": corrupt_cache,
    "half a checkpoint": truncate_checkpoint,
    "two with one store": start_second_node,
    "another certificate": replace_server,
    "clock jumps": shift_clock,
    "certificate rotated": rotate_certificate,
    "network cut": cut_network(120),
}


@dataclass(frozen=True, kw_only=True)
class FaultOutcome:
    """Outcome of one run: went on if neither `refused` nor `failed` is set."""

    seconds: float
    refused: str | None = None
    """Message of the affected process."""
    failed: str | None = None
    """Condition that was not reached, and the end of all logs."""

    def __str__(self) -> str:
        return f"{'FAILED' if self.failed else 'refused' if self.refused else 'went on'} in {self.seconds:.0f}"


def run_fault(scene: FaultScene, fault: Fault) -> FaultOutcome:
    """Run one row once."""
    scene.victim = scene.rng.choice(list(scene.federation.devices))
    started, refused, failed = time.monotonic(), None, None
    try:
        refused = fault(scene)
        used = scene.used_rounds()
        wait_until(lambda: _all_used_again(scene, used), TIMEOUT, scene.federation.logs())
        check_ledgers(scene)
    except AssertionError as error:
        failed = str(error)[-4000:]
    return FaultOutcome(seconds=time.monotonic() - started, refused=refused, failed=failed)


def _all_used_again(scene: FaultScene, used: dict[str, int]) -> bool:
    used_now = scene.used_rounds()
    return all(used_now.get(name, 0) > used.get(name, 0) for name in scene.federation.devices)


def check_ledgers(scene: FaultScene) -> None:
    """Raise AssertionError unless every ledger is valid and holds a sealed entry for every used update."""
    used = scene.used_rounds()
    for name, device in scene.federation.devices.items():
        process = run_module("client.cli.ledger", "--json", "--name", name, home=device.home)
        assert process.returncode == 0, process.stderr
        entries = json.loads(process.stdout)["entries"]
        sealed = sum(entry["state"] != "reserved" for entry in entries if entry["mechanism"])
        assert sealed >= used.get(name, 0), f"{name}: {sealed} sealed, {used.get(name)} used"


@contextlib.contextmanager
def scene(folder: Path, seed: int) -> Iterator[FaultScene]:
    """Run an endless federation in which each device has its own small disk."""
    mounted = []
    try:
        pictures = write_letter_folders(folder / "pictures", DEVICES, each=6)
        with network(list(pictures)) as command_prefix, federation(folder, RUN, host=SERVER) as running:
            running.start()
            for name, data in pictures.items():
                home = folder / name
                home.mkdir()
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(home)], check=True)
                mounted.append(home)
                device = running.enroll(name, data, "test=true", "seed=1", command_prefix=command_prefix[name])
                device.start()
            fault_scene = FaultScene(running, random.Random(seed))
            wait_until(lambda: running.rounds() >= 1, 600, running.logs())
            yield fault_scene
    finally:
        for home in mounted:
            subprocess.run(["umount", "--lazy", str(home)], check=False)


def _shifted_clock() -> dict[str, str]:
    """Return the environment of libfaketime, if installed, that sets the clock an hour ahead."""
    libraries = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    assert libraries, "clock jumps: requires libfaketime (Debian: libfaketime)"
    return {"LD_PRELOAD": str(libraries[0]), "FAKETIME": "+1h"}


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return sorted(process.children(), key=lambda child: child.create_time())
    return []


def _belongs_to(process: psutil.Process, home: Path, part: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return part in " ".join(process.cmdline()) and process.environ().get("ANTHER_HOME") == str(home)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--piece", type=int, default=5, help="runs per federation, with several jobs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows = args.rows or list(ROWS)
    pieces = [min(args.piece, args.runs - first) for first in range(0, args.runs, args.piece)]
    if args.jobs == 1:
        run_serially(rows, args.runs, args.seed, args.out)
    else:
        run_in_parallel([(row, runs) for runs in pieces for row in rows], args.jobs, args.seed, args.out)
    Console(width=120).print(table(json.loads(args.out.read_text())))


def run_serially(rows: list[str], runs: int, seed: int, out: Path) -> None:
    """Run all rows in one federation.

    Args:
        rows: names of the rows.
        runs: runs of each row.
        seed: seed of the federation.
        out: the result file.
    """
    with tempfile.TemporaryDirectory(prefix="anther-") as folder, scene(Path(folder), seed) as fault_scene:
        for row in rows:
            for _ in range(runs):
                print(f"{row}: {store_outcome(out, row, run_fault(fault_scene, ROWS[row]))} s", file=sys.stderr)


def run_in_parallel(pieces: list[tuple[str, int]], jobs: int, seed: int, out: Path) -> None:
    """Run pieces (row, number of runs) in parallel, at most `jobs` at a time.

    Args:
        pieces: pieces to run.
        jobs: federations at the same time.
        seed: seed before the first piece's.
        out: the result file.
    """
    running: list[subprocess.Popen] = []
    try:
        while pieces or running:
            while pieces and len(running) < jobs:
                running.append(_start_piece(*pieces.pop(0), seed := seed + 1, out))
            time.sleep(1)
            running = [piece for piece in running if piece.poll() is None]
    finally:
        for piece in running:
            piece.terminate()
        for piece in running:
            piece.wait()


def _start_piece(row: str, runs: int, seed: int, out: Path) -> subprocess.Popen:
    """Start a piece in a process with its own network and mounts.

    Args:
        row: name of the row.
        runs: runs of the row.
        seed: seed of the federation.
        out: the result file.
    """
    arguments = [row, "--runs", str(runs), "--seed", str(seed), "--out", str(out)]
    script = 'ip link set lo up && mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns && exec "$@"'
    return subprocess.Popen(
        [
            "unshare",
            "--net",
            "--mount",
            "sh",
            "-c",
            script,
            "-",
            sys.executable,
            "-m",
            "bench.reliability.faults",
            *arguments,
        ],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def store_outcome(out: Path, row: str, run: FaultOutcome) -> FaultOutcome:
    """Append a run to the result file under a lock, because several processes write it.

    Args:
        out: the result file.
        row: name of the row.
        run: outcome to append.
    """
    folder = os.open(out.absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = json.loads(out.read_text())["rows"] if out.exists() else {}
        rows: dict[str, list[Any]] = {name: known.get(name, []) for name in ROWS}
        rows[row].append(asdict(run))
        record = {
            "command": "python -m bench.reliability.faults",
            "machine": machine(torch.device("cpu")),
            "versions": versions("flwr", "torch"),
            "rows": rows,
        }
        write(out, (json.dumps(record, indent=2) + "\n").encode())
    finally:
        os.close(folder)
    return run


def table(record: dict[str, Any]) -> Table:
    """Return a table with a row for each fault."""
    shown = Table(title="injected faults and how the federation recovered without intervention")
    for heading in ("", "runs", "went on", "refused with a reason", "seconds (median)", "message"):
        shown.add_column(heading, justify="left" if heading in ("", "message") else "right")
    for name, runs in record["rows"].items():
        succeeded = [run for run in runs if not run["failed"]]
        message = next((run["refused"] for run in succeeded if run["refused"]), "")
        refused = sum(run["refused"] is not None for run in succeeded)
        seconds = f"{median(run['seconds'] for run in succeeded):.0f}" if succeeded else "—"
        shown.add_row(name, str(len(runs)), str(len(succeeded) - refused), str(refused), seconds, message[:60])
    return shown


if __name__ == "__main__":
    main()
