"""Inject real faults into a federation of processes, and check that it recovers.

    python -m bench.reliability.faults [ROW …] [--runs 20]

A federation of three devices runs round after round, with example-level privacy, over TLS with keys. Each run of a row
injects its fault at a random time and then waits. The federation *went on* if a later round used an update of every
device again without intervention. It *refused* if the affected process gave a one-line reason and the others went on.
After each run every ledger must be valid, and hold a sealed entry for every update that the server has used.

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
PATIENCE = 420.0  # seconds in which a federation must recover
DISK = 96  # MiB of a device's disk

Harm = Callable[["Scene"], "str | None"]
"""Injects the fault; returns the message of the affected process if it refuses."""


@dataclass
class Scene:
    """A running federation and the device that this run's fault affects."""

    federation: LocalFederation
    rng: random.Random
    victim: str = ""

    @property
    def device(self) -> ModuleProcess:
        return self.federation.devices[self.victim]

    def server_state(self) -> dict[str, Any]:
        newest = sorted(self.federation.runs[-1].glob("checkpoints/round-*"))[-1]
        found: dict[str, Any] = json.loads((newest / "state.json").read_text())
        return found

    def last_used(self) -> dict[str, int]:
        """Return the number of rounds that used an update of each device."""
        for _ in range(50):
            with contextlib.suppress(OSError, IndexError, ValueError):  # the checkpoint was just replaced
                return {name: facts["rounds"] for name, facts in self.server_state()["devices"].items()}
            time.sleep(0.1)
        raise AssertionError(f"no checkpoint can be read\n{self.federation.told()}")

    def process(self, what: str) -> psutil.Process:
        """Wait for a process of this kind, and return one at random."""
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = self._find(what)
            return bool(found)

        wait_until(look, 120, f"{what}\n{self.federation.told()}")
        return self.rng.choice(found)

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
                return [p for p in psutil.process_iter() if _is_of(p, self.federation.server.home, "flwr-serverapp")]

    def pause(self, seconds: float) -> None:
        time.sleep(self.rng.uniform(0, seconds))


def killed(what: str) -> Harm:
    def harm(scene: Scene) -> None:
        scene.pause(4)
        process = scene.process(what)
        scene.pause(0.5)
        with contextlib.suppress(psutil.NoSuchProcess):  # it exited by itself: kill the next one
            process.kill()
            return
        scene.process(what).kill()

    return harm


def server_killed(scene: Scene) -> None:
    """Kill the whole server, like a power loss of its machine, and start it again like systemd would."""
    scene.pause(4)
    scene.federation.server.kill()
    scene.federation.start()


def device_killed(scene: Scene) -> None:
    scene.pause(4)
    scene.device.kill()
    time.sleep(1)
    scene.device.start()


def disk_full(scene: Scene) -> None:
    """Fill the device's disk completely for ten seconds of a round."""
    filler = scene.device.home / "filler"
    scene.pause(3)
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    time.sleep(10)
    filler.unlink()


def corrupt_cache(scene: Scene) -> None:
    """Change bytes of the cache, and kill the worker so that it reads the cache again."""
    for file in (scene.device.home / "devices" / scene.victim / "cache").glob("*"):
        data = bytearray(file.read_bytes())
        for _ in range(max(1, len(data) // 1000)):
            data[scene.rng.randrange(len(data))] ^= 1 + scene.rng.randrange(255)
        file.write_bytes(data)
    scene.process("worker").kill()


def half_a_checkpoint(scene: Scene) -> str | None:
    """Kill the server and truncate a file of its newest checkpoint: it must name it, and resume from the one before."""
    federation = scene.federation
    federation.server.kill()
    kill_all(federation.server.home)  # like a power loss: otherwise its ServerApp may finish another round meanwhile
    newest = sorted(federation.runs[-1].glob("checkpoints/round-*"))[-1]
    file = scene.rng.choice([*newest.iterdir()])
    before = file.read_bytes()
    file.write_bytes(before[: scene.rng.randrange(len(before))])
    federation.start()
    wait_until(lambda: str(newest) in federation.server.output, 120, "the name of the damaged checkpoint")
    *_, output = (line for line in federation.server.output.splitlines() if f"delete {newest}" in line)
    federation.server.stop()
    shutil.rmtree(newest)  # as the message asks
    federation.start()
    return output.removeprefix("error: ")


def two_with_one_store(scene: Scene) -> str:
    """Start a second node with the same home."""
    own = {"ANTHER_HOME": str(scene.device.home)}
    second = ModuleProcess(
        "client.runtime.supervisor",
        scene.device.arguments,
        scene.device.home / "second",
        own,
        scene.device.command_prefix,
    )
    second.start()
    wait_until(lambda: second.exit_code is not None, 60, f"a refusal\n{second.output}")
    return second.output.strip().splitlines()[-1].removeprefix("error: ")


def another_certificate(scene: Scene) -> str:
    """Let another server answer at the same address for a while."""
    federation, device = scene.federation, scene.device
    device.stop()
    federation.server.stop()
    other = ModuleProcess(
        "server.supervisor.run", federation.server.arguments, federation.folder / f"other-{scene.rng.random()}", {}
    )
    other.start()
    wait_until(lambda: "listening on" in other.output, 120, other.output)
    before = len(device.output)
    device.start()
    wait_until(lambda: device.exit_code is not None, 120, f"a refusal\n{device.output}")
    other.stop()
    federation.start()
    device.start()
    return device.output[before:].split("error: ")[-1].splitlines()[0]


def clock_jumps(scene: Scene) -> str:
    """Start the device with its clock an hour ahead: it must report that and wait, and go on with the right clock."""
    device, before = scene.device, len(scene.device.output)
    device.stop()
    device.environment = _ahead()
    device.start()
    wait_until(lambda: "clock is" in device.output[before:], 240, f"a message on the clock\n{device.output[-2000:]}")
    device.stop()
    device.environment = {}
    device.start()
    return next(line for line in device.output[before:].splitlines() if "clock is" in line)


def certificate_anew(scene: Scene) -> None:
    """Rotate the server's key and certificate while the federation runs."""
    scene.pause(4)
    done = run_module("server.gateway.keys", "rotate", home=scene.federation.server.home)
    assert done.returncode == 0, done.stderr


def cut(seconds: float) -> Harm:
    """Take the device's network down from the middle of an upload."""

    def harm(scene: Scene) -> None:
        process = scene.process("ClientApp")
        with contextlib.suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
            process.wait(60)  # it exits when its reply is about to be uploaded
        scene.pause(0.3)
        set_link(scene.victim, on=False)
        time.sleep(seconds)
        set_link(scene.victim, on=True)

    return harm


ROWS: dict[str, Harm] = {
    **{f"kill -9 {what}": killed(what) for what in ("ClientApp", "worker", "SuperNode", "SuperLink", "server app")},
    "kill -9 server": server_killed,
    "kill -9 device": device_killed,
    "disk full": disk_full,
    "corrupt cache": corrupt_cache,
    "half a checkpoint": half_a_checkpoint,
    "two with one store": two_with_one_store,
    "another certificate": another_certificate,
    "clock jumps": clock_jumps,
    "certificate rotated": certificate_anew,
    "network cut": cut(120),
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


def once(scene: Scene, harm: Harm) -> FaultOutcome:
    """Run one row once."""
    scene.victim = scene.rng.choice(list(scene.federation.devices))
    began, refused, failed = time.monotonic(), None, None
    try:
        refused = harm(scene)
        before = scene.last_used()
        wait_until(lambda: _all_again(scene, before), PATIENCE, scene.federation.told())
        whole(scene)
    except AssertionError as error:
        failed = str(error)[-4000:]
    return FaultOutcome(seconds=time.monotonic() - began, refused=refused, failed=failed)


def _all_again(scene: Scene, before: dict[str, int]) -> bool:
    now = scene.last_used()
    return all(now.get(name, 0) > before.get(name, 0) for name in scene.federation.devices)


def whole(scene: Scene) -> None:
    """Raise AssertionError unless every ledger is valid and holds a sealed entry for every used update."""
    used = scene.last_used()
    for name, device in scene.federation.devices.items():
        done = run_module("client.cli.ledger", "--json", "--name", name, home=device.home)
        assert done.returncode == 0, done.stderr
        entries = json.loads(done.stdout)["entries"]
        sealed = sum(entry["state"] != "reserved" for entry in entries if entry["mechanism"])
        assert sealed >= used.get(name, 0), f"{name}: {sealed} sealed, {used.get(name)} used"


@contextlib.contextmanager
def scene(folder: Path, seed: int) -> Iterator[Scene]:
    """Run an endless federation whose devices have small disks of their own."""
    mounted = []
    try:
        pictures = write_letter_folders(folder / "pictures", DEVICES, each=6)
        with network(list(pictures)) as command_prefix, federation(folder, RUN, host=SERVER) as found:
            found.start()
            for name, data in pictures.items():
                home = folder / name
                home.mkdir()
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(home)], check=True)
                mounted.append(home)
                device = found.enroll(name, data, "test=true", "seed=1", command_prefix=command_prefix[name])
                device.start()
            at_work = Scene(found, random.Random(seed))
            wait_until(lambda: found.rounds() >= 1, 600, found.told())
            yield at_work
    finally:
        for home in mounted:
            subprocess.run(["umount", "--lazy", str(home)], check=False)


def _ahead() -> dict[str, str]:
    """Environment of libfaketime, if installed, that sets the clock an hour ahead."""
    found = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    assert found, "clock jumps: requires libfaketime (Debian: libfaketime)"
    return {"LD_PRELOAD": str(found[0]), "FAKETIME": "+1h"}


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return sorted(process.children(), key=lambda child: child.create_time())
    return []


def _is_of(process: psutil.Process, home: Path, part: str) -> bool:
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
    asked = parser.parse_args()
    if unknown := set(asked.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows = asked.rows or list(ROWS)
    pieces = [min(asked.piece, asked.runs - first) for first in range(0, asked.runs, asked.piece)]
    if asked.jobs == 1:
        here(rows, asked.runs, asked.seed, asked.out)
    else:
        side_by_side([(row, runs) for runs in pieces for row in rows], asked.jobs, asked.seed, asked.out)
    Console(width=120).print(table(json.loads(asked.out.read_text())))


def here(rows: list[str], runs: int, seed: int, out: Path) -> None:
    """Run all rows in one federation."""
    with tempfile.TemporaryDirectory(prefix="anther-") as folder, scene(Path(folder), seed) as at_work:
        for row in rows:
            for _ in range(runs):
                print(f"{row}: {keep(out, row, once(at_work, ROWS[row]))} s", file=sys.stderr)


def side_by_side(waiting: list[tuple[str, int]], jobs: int, seed: int, out: Path) -> None:
    """Run pieces (row, number of runs) in parallel, at most `jobs` at a time.

    Args:
        waiting: pieces to run.
        jobs: federations at the same time.
        seed: seed before the first piece's.
        out: the result file.
    """
    working: list[subprocess.Popen] = []
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                working.append(_apart(*waiting.pop(0), seed := seed + 1, out))
            time.sleep(1)
            working = [piece for piece in working if piece.poll() is None]
    finally:
        for piece in working:
            piece.terminate()
        for piece in working:
            piece.wait()


def _apart(row: str, runs: int, seed: int, out: Path) -> subprocess.Popen:
    """Start a piece in a process with its own network and mounts.

    Args:
        row: name of the row.
        runs: runs of the row.
        seed: seed of the federation.
        out: the result file.
    """
    arguments = [row, "--runs", str(runs), "--seed", str(seed), "--out", str(out)]
    own = 'ip link set lo up && mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns && exec "$@"'
    return subprocess.Popen(
        [
            "unshare",
            "--net",
            "--mount",
            "sh",
            "-c",
            own,
            "-",
            sys.executable,
            "-m",
            "bench.reliability.faults",
            *arguments,
        ],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def keep(out: Path, row: str, run: FaultOutcome) -> FaultOutcome:
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
    shown = Table(title="injected faults and how the federation recovered without intervention")
    for heading in ("", "runs", "went on", "refused with a reason", "seconds (median)", "message"):
        shown.add_column(heading, justify="left" if heading in ("", "message") else "right")
    for name, runs in record["rows"].items():
        good = [run for run in runs if not run["failed"]]
        output = next((run["refused"] for run in good if run["refused"]), "")
        refused = sum(run["refused"] is not None for run in good)
        seconds = f"{median(run['seconds'] for run in good):.0f}" if good else "—"
        shown.add_row(name, str(len(runs)), str(len(good) - refused), str(refused), seconds, output[:60])
    return shown


if __name__ == "__main__":
    main()
