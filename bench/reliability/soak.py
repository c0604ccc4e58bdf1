"""Run a federation for hundreds of rounds, and check its accounting and memory.

    anther bench soak [--rounds 500]

Runs short rounds over TLS with keys, while all devices but one join, leave and die at random. At the end the run must
be complete. The server must account for every requested update as used, late, rejected or lost, including every update
that a device has sealed. Memory must be constant: for each process that runs throughout, the slope of a line fitted to
its PSS after a warm-up, over all rounds, in percent of its first value. PSS divides a library's pages among the
processes that map it, so don't start or end other Python processes during the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console

from bench.lib.machine import machine, versions
from bench.reliability.faults import RUN as PRIVATE
from bench.reliability.processes import LocalFederation, ModuleProcess, federation, run_module, write_letter_folders

OUT = Path("bench/results/soak.json")
DEVICES, MIN_RUNNING = 5, 1
SERVER, DEVICE = (
    ("server.supervisor.run", "server.supervisor.local_superlink", "flwr-serverapp"),
    ("client.runtime.supervisor", "client.runtime.supernode", "client.runtime.worker"),
)
MAX_GROWTH = 3.0  # percent
WARM_UP = 0.1  # fraction of the rounds
EVENTS = ("join", "leave", "die")


@dataclass
class MemorySamples:
    """PSS samples in MiB of the processes of the server and of the permanent device, by round."""

    samples: dict[tuple[str, int], list[tuple[int, float]]] = field(default_factory=dict)

    def sample(self, running: LocalFederation, permanent: ModuleProcess, number: int) -> None:
        """Sample the memory of all processes.

        Args:
            running: the federation.
            permanent: device that does not leave.
            number: current round.
        """
        homes = {str(running.server.home): SERVER, str(permanent.home): DEVICE}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                parts = homes.get(process.environ().get("ANTHER_HOME", ""), ())
                command_line = " ".join(process.cmdline())
                if part := next((part for part in parts if part in command_line), None):
                    pss = process.memory_full_info().pss / 2**20
                    self.samples.setdefault((part, process.pid), []).append((number, pss))

    def slopes(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Return the growth of permanent processes over all rounds, in percent of their value after the warm-up."""
        result = {}
        for (part, _), samples in sorted(self.samples.items()):
            late = np.array([(number, pss) for number, pss in samples if number >= WARM_UP * rounds])
            if samples[0][0] > WARM_UP * rounds or samples[-1][0] < (1 - WARM_UP) * rounds:
                continue
            slope, start = np.polyfit(late[:, 0], late[:, 1], 1)
            first = start + slope * late[0, 0]
            grown = 100 * slope * (rounds - late[0, 0]) / first
            name = part if part not in result else f"{part} (its fork)"
            result[name] = {"mib": float(first), "per_cent": float(grown), "curve": samples[:: len(samples) // 50 or 1]}
        return result


def change_membership(changing: list[ModuleProcess], rng: random.Random, counts: Counter[str]) -> None:
    """Make a random device join, leave or die, except the last running one.

    Args:
        changing: devices that may change.
        rng: source of randomness.
        counts: incremented for the event.
    """
    running = [device for device in changing if device.exit_code is None]
    stopped = [device for device in changing if device.exit_code is not None]
    event = rng.choice(EVENTS)
    if event == "join" and stopped:
        rng.choice(stopped).start()
    elif event == "leave" and len(running) > MIN_RUNNING:
        rng.choice(running).stop()
    elif event == "die" and len(running) > MIN_RUNNING:
        rng.choice(running).kill()
    else:
        return
    counts[event] += 1


def account_updates(history: list[dict[str, Any]]) -> dict[str, int]:
    """Count the outcomes of all requested updates; `unaccounted` counts those without any."""
    counts: Counter[str] = Counter()
    for record in history:
        if (train := record["train"]) is None:
            continue
        late = train["dropped"].get("late", 0)  # from earlier rounds, which counted them as lost
        counts["asked"] += train["asked"]
        counts["used"] += train["replied"]
        counts["late"] += late
        counts["lost"] += train["dropped"].get("no reply", 0) - late
        counts["rejected"] += sum(n for reason, n in train["dropped"].items() if reason not in ("late", "no reply"))
    counts["unaccounted"] = counts["asked"] - counts["used"] - counts["late"] - counts["lost"] - counts["rejected"]
    return dict(counts)


def count_sealed(running: LocalFederation) -> int:
    """Count the updates that devices have sealed, from their ledgers."""
    total = 0
    for name, device in running.devices.items():
        process = run_module("client.cli.ledger", "--json", "--name", name, home=device.home)
        assert process.returncode == 0, process.stderr
        entries = json.loads(process.stdout)["entries"]
        total += sum(entry["state"] != "reserved" for entry in entries if entry["mechanism"])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--every", type=int, default=10, help="rounds between two events")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rng, memory, events, started = random.Random(args.seed), MemorySamples(), Counter[str](), time.monotonic()
    overrides = PRIVATE.replace("rounds=5000", f"rounds={args.rounds}").replace("timeout=90", "timeout=30")
    with tempfile.TemporaryDirectory(prefix="anther-") as folder, federation(Path(folder), overrides) as running:
        running.start()
        for name, data in write_letter_folders(Path(folder) / "pictures", DEVICES, each=6).items():
            running.enroll(name, data, "test=true", "seed=1").start()
        permanent, *changing = running.devices.values()
        seen = next_event = 0
        while running.server.exit_code is None:
            time.sleep(0.5)
            if (number := running.rounds()) > seen:
                seen = number
                memory.sample(running, permanent, number)
            if seen >= next_event + args.every:
                next_event = seen
                change_membership(changing, rng, events)
        state = json.loads((sorted(running.runs[-1].glob("checkpoints/round-*"))[-1] / "state.json").read_text())
        logs, exit_code, sealed = running.logs(), running.server.exit_code, count_sealed(running)
    record = {
        "command": " ".join(["python -m bench.reliability.soak", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "versions": versions("flwr", "torch"),
        "load": os.getloadavg()[0],
        "rounds": len(state["history"]) - 1,
        "seconds": time.monotonic() - started,
        "ended": exit_code,
        "events": dict(events),
        "accounts": account_updates(state["history"]),
        "sealed": sealed,
        "memory": memory.slopes(args.rounds),
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    if exit_code:
        print(logs, file=sys.stderr)
    show(record)


def show(record: dict[str, Any]) -> None:
    """Print the record."""
    console = Console(width=120)
    console.print(f"{record['rounds']} rounds in {record['seconds'] / 60:.0f} min, events {record['events']}")
    counted = record["accounts"]
    console.print(f"updates {counted}; sealed by devices: {record['sealed']}")
    known = counted["used"] + counted["late"] + counted["lost"] + counted["rejected"]
    if counted["unaccounted"] or not counted["used"] <= record["sealed"] <= known:
        console.print("NOT ACCOUNTED FOR")
    for name, slope in record["memory"].items():
        verdict = "yes" if slope["per_cent"] <= MAX_GROWTH else "no"
        console.print(f"{name}: {slope['mib']:.0f} MiB, {slope['per_cent']:+.1f} % (≤ {MAX_GROWTH:g} %: {verdict})")


if __name__ == "__main__":
    main()
