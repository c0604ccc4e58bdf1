"""Does a federation last?  python -m bench.soak [--rounds 500]

Short rounds over TLS with keys, in which devices join, leave and die at random. At the end every update that was asked
for must be accounted for, as used, late, rejected or lost, and memory must be flat: the slope of a line through the PSS
of each process that lived all along, after a warm-up, over all the rounds, in per cent of what it began with.
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

from bench.faults import RUN as PRIVATE
from bench.machine import machine, versions
from bench.processes import Federation, federation, letters

OUT = Path("bench/results/soak.json")
DEVICES, LEAST = 5, 2
FLAT = 3.0  # per cent
WARM = 0.1  # of the rounds
EVENTS = ("join", "leave", "die")


@dataclass
class Memory:
    """PSS in MiB of the server's processes, by round."""

    samples: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def look(self, found: Federation, number: int) -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if process.environ().get("ANTHER_HOME") != str(found.server.home):
                    continue
                part = next((p for p in ("server.run", "flower-superlink", "flwr-serverapp") if p in words), None)
                if part:
                    pss = process.memory_full_info().pss / 2**20
                    self.samples.setdefault(part, []).append((number, pss))

    def slopes(self, rounds: int) -> dict[str, dict[str, float]]:
        """Growth over all the rounds, in per cent of what there was after the warm-up."""
        told = {}
        for name, samples in self.samples.items():
            late = np.array([(number, pss) for number, pss in samples if number >= WARM * rounds])
            if len(late) > 2:
                slope, start = np.polyfit(late[:, 0], late[:, 1], 1)
                first = start + slope * late[0, 0]
                grown = 100 * slope * (rounds - late[0, 0]) / first
                told[name] = {"mib": float(first), "per_cent": float(grown)}
        return told


def happens(found: Federation, drawn: random.Random, counts: Counter[str]) -> None:
    """A device joins, leaves or dies; some stay."""
    there = [device for device in found.devices.values() if device.code is None]
    gone = [device for device in found.devices.values() if device.code is not None]
    event = drawn.choice(EVENTS)
    if event == "join" and gone:
        drawn.choice(gone).start()
    elif event == "leave" and len(there) > LEAST:
        drawn.choice(there).stop()
    elif event == "die" and len(there) > LEAST:
        drawn.choice(there).kill()
    else:
        return
    counts[event] += 1


def accounts(history: list[dict[str, Any]]) -> dict[str, int]:
    """Of all that was asked for, what became of it; `unaccounted` is what nothing is known of."""
    found: Counter[str] = Counter()
    for done in history:
        if (train := done["train"]) is None:
            continue
        late = train["dropped"].get("late", 0)  # of earlier rounds, in which it was lost
        found["asked"] += train["asked"]
        found["used"] += train["replied"]
        found["late"] += late
        found["lost"] += train["dropped"].get("no reply", 0) - late
        found["rejected"] += sum(n for why, n in train["dropped"].items() if why not in ("late", "no reply"))
    found["unaccounted"] = found["asked"] - found["used"] - found["late"] - found["lost"] - found["rejected"]
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--every", type=int, default=10, help="rounds between two events")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    drawn, memory, events, began = random.Random(asked.seed), Memory(), Counter[str](), time.monotonic()
    words = PRIVATE.replace("rounds=500", f"rounds={asked.rounds}").replace("timeout=90", "timeout=30")
    with tempfile.TemporaryDirectory(prefix="anther-") as folder, federation(Path(folder), words) as found:
        found.start()
        for name, data in letters(Path(folder) / "pictures", DEVICES, each=6).items():
            found.enrol(name, data, "test=true", "seed=1").start()
        seen = next_event = 0
        while found.server.code is None:
            time.sleep(0.5)
            if (number := found.rounds()) > seen:
                seen = number
                memory.look(found, number)
            if seen >= next_event + asked.every:
                next_event = seen
                happens(found, drawn, events)
        state = json.loads((sorted(found.runs[-1].glob("checkpoints/round-*"))[-1] / "state.json").read_text())
        told, code = found.told(), found.server.code
    record = {
        "command": " ".join(["python -m bench.soak", *sys.argv[1:]]), "machine": machine(torch.device("cpu")),
        "versions": versions("flwr", "torch"), "load": os.getloadavg()[0], "rounds": len(state["history"]) - 1,
        "seconds": time.monotonic() - began, "ended": code, "events": dict(events),
        "accounts": accounts(state["history"]), "memory": memory.slopes(asked.rounds),
    }  # fmt: skip
    asked.out.write_text(json.dumps(record, indent=2) + "\n")
    if code:
        print(told, file=sys.stderr)
    show(record)


def show(record: dict[str, Any]) -> None:
    console = Console(width=120)
    console.print(f"{record['rounds']} rounds in {record['seconds'] / 60:.0f} min, events {record['events']}")
    console.print(f"updates {record['accounts']}")
    for name, found in record["memory"].items():
        verdict = "yes" if found["per_cent"] <= FLAT else "no"
        console.print(f"{name}: {found['mib']:.0f} MiB, {found['per_cent']:+.1f} % (≤ {FLAT:g} %: {verdict})")


if __name__ == "__main__":
    main()
