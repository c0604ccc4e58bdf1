"""Run a federation for hundreds of rounds, and check its accounting and memory.

    python -m bench.reliability.soak [--rounds 500]

Runs short rounds over TLS with keys, while all devices but one join, leave and die at random. At the end the run must
be complete. The server must account for every requested update as used, late, rejected or lost, and every update that a
device has sealed must be among them. Memory must be flat: for each process that lives throughout, the slope of a line
fitted to its PSS after a warm-up, over all rounds, in percent of its first value. PSS divides a library's pages among
the processes that map it, so don't start or end other Python processes meanwhile.
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
DEVICES, LEAST = 5, 1
SERVER, DEVICE = (
    ("server.supervisor.run", "server.supervisor.local_superlink", "flwr-serverapp"),
    ("client.runtime.supervisor", "client.runtime.supernode", "client.runtime.worker"),
)
FLAT = 3.0  # percent
WARM = 0.1  # fraction of the rounds
EVENTS = ("join", "leave", "die")


@dataclass
class MemorySamples:
    """PSS samples in MiB of the processes of the server and of the permanent device, by round."""

    samples: dict[tuple[str, int], list[tuple[int, float]]] = field(default_factory=dict)

    def look(self, found: LocalFederation, stays: ModuleProcess, number: int) -> None:
        homes = {str(found.server.home): SERVER, str(stays.home): DEVICE}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                parts = homes.get(process.environ().get("ANTHER_HOME", ""), ())
                words = " ".join(process.cmdline())
                if part := next((part for part in parts if part in words), None):
                    pss = process.memory_full_info().pss / 2**20
                    self.samples.setdefault((part, process.pid), []).append((number, pss))

    def slopes(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Return the growth of permanent processes over all rounds, in percent of their value after the warm-up."""
        told = {}
        for (part, _), samples in sorted(self.samples.items()):
            late = np.array([(number, pss) for number, pss in samples if number >= WARM * rounds])
            if samples[0][0] > WARM * rounds or samples[-1][0] < (1 - WARM) * rounds:
                continue
            slope, start = np.polyfit(late[:, 0], late[:, 1], 1)
            first = start + slope * late[0, 0]
            grown = 100 * slope * (rounds - late[0, 0]) / first
            name = part if part not in told else f"{part} (its fork)"
            told[name] = {"mib": float(first), "per_cent": float(grown), "curve": samples[:: len(samples) // 50 or 1]}
        return told


def happens(changing: list[ModuleProcess], rng: random.Random, counts: Counter[str]) -> None:
    """Make a random device join, leave or die, except the last running one.

    Args:
        changing: devices that may change.
        rng: source of randomness.
        counts: incremented for the event.
    """
    there = [device for device in changing if device.exit_code is None]
    gone = [device for device in changing if device.exit_code is not None]
    event = rng.choice(EVENTS)
    if event == "join" and gone:
        rng.choice(gone).start()
    elif event == "leave" and len(there) > LEAST:
        rng.choice(there).stop()
    elif event == "die" and len(there) > LEAST:
        rng.choice(there).kill()
    else:
        return
    counts[event] += 1


def accounts(history: list[dict[str, Any]]) -> dict[str, int]:
    """Count the outcomes of all requested updates; `unaccounted` counts those without any."""
    found: Counter[str] = Counter()
    for done in history:
        if (train := done["train"]) is None:
            continue
        late = train["dropped"].get("late", 0)  # from earlier rounds, which counted them as lost
        found["asked"] += train["asked"]
        found["used"] += train["replied"]
        found["late"] += late
        found["lost"] += train["dropped"].get("no reply", 0) - late
        found["rejected"] += sum(n for why, n in train["dropped"].items() if why not in ("late", "no reply"))
    found["unaccounted"] = found["asked"] - found["used"] - found["late"] - found["lost"] - found["rejected"]
    return dict(found)


def sealed(found: LocalFederation) -> int:
    """Count the updates that devices have sealed, from their ledgers."""
    total = 0
    for name, device in found.devices.items():
        done = run_module("client.cli.ledger", "--json", "--name", name, home=device.home)
        assert done.returncode == 0, done.stderr
        entries = json.loads(done.stdout)["entries"]
        total += sum(entry["state"] != "reserved" for entry in entries if entry["mechanism"])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--every", type=int, default=10, help="rounds between two events")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    rng, memory, events, began = random.Random(asked.seed), MemorySamples(), Counter[str](), time.monotonic()
    words = PRIVATE.replace("rounds=5000", f"rounds={asked.rounds}").replace("timeout=90", "timeout=30")
    with tempfile.TemporaryDirectory(prefix="anther-") as folder, federation(Path(folder), words) as found:
        found.start()
        for name, data in write_letter_folders(Path(folder) / "pictures", DEVICES, each=6).items():
            found.enroll(name, data, "test=true", "seed=1").start()
        stays, *changing = found.devices.values()
        seen = next_event = 0
        while found.server.exit_code is None:
            time.sleep(0.5)
            if (number := found.rounds()) > seen:
                seen = number
                memory.look(found, stays, number)
            if seen >= next_event + asked.every:
                next_event = seen
                happens(changing, rng, events)
        state = json.loads((sorted(found.runs[-1].glob("checkpoints/round-*"))[-1] / "state.json").read_text())
        told, exit_code, seals = found.told(), found.server.exit_code, sealed(found)
    record = {
        "command": " ".join(["python -m bench.reliability.soak", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "versions": versions("flwr", "torch"),
        "load": os.getloadavg()[0],
        "rounds": len(state["history"]) - 1,
        "seconds": time.monotonic() - began,
        "ended": exit_code,
        "events": dict(events),
        "accounts": accounts(state["history"]),
        "sealed": seals,
        "memory": memory.slopes(asked.rounds),
    }
    asked.out.write_text(json.dumps(record, indent=2) + "\n")
    if exit_code:
        print(told, file=sys.stderr)
    show(record)


def show(record: dict[str, Any]) -> None:
    console = Console(width=120)
    console.print(f"{record['rounds']} rounds in {record['seconds'] / 60:.0f} min, events {record['events']}")
    counted = record["accounts"]
    console.print(f"updates {counted}; sealed by devices: {record['sealed']}")
    known = counted["used"] + counted["late"] + counted["lost"] + counted["rejected"]
    if counted["unaccounted"] or not counted["used"] <= record["sealed"] <= known:
        console.print("NOT ACCOUNTED FOR")
    for name, found in record["memory"].items():
        verdict = "yes" if found["per_cent"] <= FLAT else "no"
        console.print(f"{name}: {found['mib']:.0f} MiB, {found['per_cent']:+.1f} % (≤ {FLAT:g} %: {verdict})")


if __name__ == "__main__":
    main()
