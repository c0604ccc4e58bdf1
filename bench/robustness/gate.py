"""Measure the cost and acceptance of malicious messages.

    anther bench gate [--fuzzed 20000] [key=value …]

Sends every message type of both directions, at the sizes of the configured base: a named corpus of attacks, and
mutations of honest messages. Each message is received by itself; if it is accepted, it is checked against invariants
that share no code with the gate. CPU time and growth of peak resident memory are those of the receiver only. For
comparison, `safetensors.torch.load`, the usual reader of such bytes, reads the same adapters.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load as stock_load

from bench.lib.machine import machine, versions
from bench.robustness.attack_corpus import (
    MessageAttack,
    adapter_attacks,
    json_attacks,
    random_attack,
    records_attack,
    to_records,
)
from bench.robustness.ingress import ACCEPTED, Ingress, ingresses
from bench.robustness.invariants import ExpectedMessage, adapter_violations
from conf.compose import compose
from models.base.base import load
from models.lora.adapter import Sites

MAX_MS, MAX_MIB = 100.0, 64.0
TO_SERVER = ("Update", "Evaluation", "Personalized", "DeviceReport")
EMPTY = 1_000_000  # tensors of the attack with empty tensors
_M_MMAP_THRESHOLD = -3


@dataclass
class AttackCounts:
    """Outcomes of one class of attacks."""

    reasons: Counter[str] = field(default_factory=Counter)
    violating: int = 0
    """Messages that were accepted although they violate an invariant."""
    ms: float = 0.0
    mib: float = 0.0

    def add(self, reason: str, ms: float, mib: float, violated: list[str]) -> None:
        """Count one message.

        Args:
            reason: outcome of the message.
            ms: CPU milliseconds to receive it.
            mib: growth of memory in MiB.
            violated: invariants that the accepted message violates.
        """
        self.reasons[reason] += 1
        self.violating += bool(violated)
        self.ms, self.mib = max(self.ms, ms), max(self.mib, mib)


AttackTable = dict[tuple[str, str], AttackCounts]


def measure(work: Callable[[], str]) -> tuple[str, float, float]:
    """Run `work`; return its answer, its milliseconds of CPU time, and the maximum growth of resident memory in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    resident = _resident("VmRSS")
    started = time.process_time()
    answer = work()
    return answer, 1e3 * (time.process_time() - started), (_resident("VmHWM") - resident) / 1024


def _resident(name: str) -> int:
    """Return a value of the kernel's status file in KiB."""
    (value,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(value)


def corpus(ingress: Ingress, *, empty: int = EMPTY) -> Iterator[MessageAttack]:
    """Yield the honest message, and every named attack on its type."""
    message = ingress.honest
    yield records_attack("honest", to_records(message), message.adapter)
    for kind, text in json_attacks(message.text):
        yield records_attack(kind, to_records(message._replace(text=text)))
    if message.adapter is not None:
        for kind, payload in adapter_attacks(message.adapter, empty=empty):
            yield records_attack(kind, to_records(message._replace(adapter=payload)), payload)


def run(
    sites: Sites, *, rank: int, fuzzed: int, seed: int, folder: Path, empty: int = EMPTY
) -> tuple[AttackTable, AttackTable]:
    """Measure the gate and the peer.

    Args:
        sites: sites of the adapters.
        rank: rank of the adapters.
        fuzzed: number of mutated messages.
        seed: seed of the mutations.
        folder: the simulated device's storage.
        empty: number of tensors of the attack with empty tensors.

    Returns:
        Counts of the gate and of the peer, by direction and class of attack.
    """
    gate: AttackTable = {}
    peer: AttackTable = {}
    sizes = {name: (site.inputs, site.outputs) for name, site in sites.items()}
    expected = ExpectedMessage("Update", sizes, rank, {"rank": rank})

    entry_points = ingresses(sites, rank=rank, folder=folder)

    def attacks() -> Iterator[tuple[str, Ingress, MessageAttack]]:
        random = Random(seed)
        for name, ingress in entry_points.items():
            yield from ((_direction(name), ingress, attack) for attack in corpus(ingress, empty=empty))
        names = sorted(entry_points)
        names += ["Update", "Train"] * 4  # the types with most fields and tensors
        for _ in range(fuzzed):
            name = random.choice(names)
            attack = random_attack(entry_points[name].honest, random, objects=name in TO_SERVER)
            yield _direction(name), entry_points[name], attack._replace(kind=f"fuzzed: {attack.kind}")

    for direction, ingress, attack in attacks():
        opened = ingress.open(attack)
        answer, ms, mib = measure(opened.deliver)
        violated = opened.violated() if answer == ACCEPTED else []
        gate.setdefault((direction, attack.kind), AttackCounts()).add(answer, ms, mib, violated)
    # After the gate: memory that the peer frees would otherwise be reused by the gate and hide its growth.
    for direction, _, attack in attacks():
        if attack.payload is not None and direction == "to server":
            payload = attack.payload
            outcome = measure(partial(_stock, payload))
            against = adapter_violations(payload, expected) if outcome[0] == ACCEPTED else []
            peer.setdefault((direction, attack.kind), AttackCounts()).add(*outcome, against)
    return gate, peer


def _direction(name: str) -> str:
    return "to server" if name in TO_SERVER else "to device"


def _stock(payload: bytes) -> str:
    try:
        stock_load(payload)
    except Exception as error:
        return type(error).__name__
    return ACCEPTED


def table(gate: AttackTable, peer: AttackTable) -> Table:
    """Return a table with a row for each class, and the peer's counts beside the gate's."""
    shown = Table(title="malicious messages; largest CPU time and memory growth of one message")
    for heading in ("direction", "class"):
        shown.add_column(heading)
    for heading in ("sent", "accepted", "wrongly", "refused", "ms", "MiB", "peer accepted", "wrongly", "ms", "MiB"):
        shown.add_column(heading, justify="right")
    for (direction, kind), row in gate.items():
        refused = ", ".join(f"{count} {reason}" for reason, count in row.reasons.most_common() if reason != ACCEPTED)
        cells = [direction, kind, *_numbers(row)[:3], refused, *_numbers(row)[3:]]
        other = peer.get((direction, kind))
        shown.add_row(*cells, *(_numbers(other)[1:] if other else ()))
    return shown


def _numbers(row: AttackCounts) -> list[str]:
    return [
        str(row.reasons.total()),
        str(row.reasons[ACCEPTED]),
        str(row.violating),
        f"{row.ms:.1f}",
        f"{row.mib:.1f}",
    ]


def record(rows: AttackTable) -> list[dict[str, Any]]:
    """Convert the counts to rows of the result file."""
    return [
        {
            "direction": direction,
            "class": kind,
            "sent": row.reasons.total(),
            "accepted": row.reasons[ACCEPTED],
            "accepted against an invariant": row.violating,
            "refused": {reason: count for reason, count in row.reasons.most_common() if reason != ACCEPTED},
            "worst_ms": row.ms,
            "worst_mib": row.mib,
        }
        for (direction, kind), row in rows.items()
    ]


def failures(gate: AttackTable) -> list[str]:
    """List the promises of the gate that do not hold."""
    broken = []
    for (direction, kind), row in gate.items():
        where = f"{direction}, {kind}"
        broken += [f"{where}: {reason}" for reason in row.reasons if reason.startswith("crash")]
        if row.violating:
            broken.append(f"{where}: {row.violating} accepted against an invariant")
        if row.ms > MAX_MS or row.mib > MAX_MIB:
            broken.append(f"{where}: {row.ms:.0f} ms and {row.mib:.0f} MiB at worst")
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzzed", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gate.json"))
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 64 * 1024)  # frees return memory, so the next message's growth shows
    config = compose(" ".join(overrides))
    sites = load(config.base.path, sites=config.adapter.sites, device="cpu").sites
    rank = config.adapter.shared.rank
    gc.collect()
    gc.freeze()  # otherwise a collection traverses all imported objects during some message
    with tempfile.TemporaryDirectory() as folder:
        gate, peer = run(sites, rank=rank, fuzzed=arguments.fuzzed, seed=arguments.seed, folder=Path(folder))
    numbers = rank * sum(site.inputs + site.outputs for site in sites.values())
    broken = failures(gate)
    result = {
        "command": " ".join(
            ["python -m bench.robustness.gate", f"--fuzzed {arguments.fuzzed}", f"--seed {arguments.seed}", *overrides]
        ),
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "flwr", "safetensors"),
        "adapter": {"rank": rank, "sites": len(sites), "numbers": numbers},
        "bounds": {"ms": MAX_MS, "mib": MAX_MIB, "broken": broken},
        "gate": record(gate),
        "safetensors.torch.load": record(peer),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=200).print(table(gate, peer))
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
