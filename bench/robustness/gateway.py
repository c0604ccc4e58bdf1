"""Run a federation under attack by hostile clients, and check that it survives.

    anther bench gateway [--calls 20000]

Three honest devices run endless rounds over TLS, with one more that refuses every request (`mallory`). After some calm
rounds, in the same processes, mallory misuses each message that it receives, and an enrolled client (`eve`) and one
that isn't (`stranger`) make malformed and hostile calls (`bench.robustness.fleet_attacks`), each at the rate that the
server allows a device by default. The rate limit and the cost of hostile calls are lifted, so that every call reaches
as much code as possible.

The bench passes if no round misses an honest device's reply, no process of the server or of a device was restarted, the
median round takes at most 1.2 times the median calm round, the gateway's memory and the SuperLink's database are
bounded, no call was answered with an internal server error, and no call of the stranger succeeded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.reliability.processes import (
    LocalFederation,
    ModuleProcess,
    federation,
    run_module,
    wait_until,
    write_letter_folders,
)
from common.atomic_files import write
from models.files import assets
from server.supervisor import database

OUT = Path("bench/results/gateway.json")
HONEST, CALM = 3, 10
RATE = 20.0  # calls per second of each client: server.limits.requests_per_minute
RUN = (
    "rounds=100000 aggregation=fedit round_loop.timeout=600 adapter.shared.steps=2 adapter.shared.batch_size=2 "
    "adapter.shared.rank=1 adapter.sites=conv_in|conv_out evaluation.timesteps=1 "
    "server.limits.requests_per_minute=1000000"
)
MAX_SLOWDOWN, MAX_MEMORY_MIB, MAX_DISK_MIB = 1.2, 256.0, 64.0  # ratio, MiB of growth, MiB
SERVER = ("server.supervisor.run", "server.supervisor.local_superlink", "flwr-serverapp")
DEVICE = ("client.runtime.supervisor", "client.runtime.supernode", "client.runtime.worker")

_ROUND = re.compile(r"round (\d+) of \d+: (\d+) of (\d+) replied.* ([\d.]+) s\b")


@dataclass(frozen=True)
class RoundRecord:
    """A round as recorded in the server's log."""

    number: int
    replied: int
    asked: int
    seconds: float


@dataclass
class GatewayResults:
    """Measurements of one federation."""

    calls: int = 0
    calm_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    """Rounds under attack in which an honest device's reply is missing."""
    restarted: list[str] = field(default_factory=list)
    memory_mib: float = 0.0
    """Largest growth of the gateway's memory since the calm rounds, in MiB."""
    disk_mib: float = 0.0
    """Largest size of the SuperLink's database in MiB."""
    outcomes: dict[str, list[tuple[str, str, int]]] = field(default_factory=dict)
    """By client: kind of call, outcome, count."""

    @property
    def slower(self) -> float:
        """Ratio of the median round under attack to the median calm round."""
        return median(self.seconds) / median(self.calm_seconds) if self.seconds and self.calm_seconds else float("inf")

    def errors(self) -> list[str]:
        """List the calls with unacceptable answers."""
        return [
            f"{who}: {kind}: {outcome} × {count}"
            for who, calls in self.outcomes.items()
            for kind, outcome, count in calls
            if outcome in ("500", "502") or (who == "stranger" and outcome == "200")
        ]

    def failures(self) -> list[str]:
        """List the claims that do not hold."""
        checks = {
            f"rounds without a device's reply: {self.lost}": bool(self.lost),
            f"restarted: {', '.join(self.restarted)}": bool(self.restarted),
            f"rounds take {self.slower:.2f} times as long": not self.slower <= MAX_SLOWDOWN,
            f"the gateway's memory grew by {self.memory_mib:.0f} MiB": self.memory_mib > MAX_MEMORY_MIB,
            f"the SuperLink's database has {self.disk_mib:.0f} MiB": self.disk_mib > MAX_DISK_MIB,
        }
        return [text for text, failed in checks.items() if failed] + self.errors()


def rounds(log: str) -> list[RoundRecord]:
    """Parse the rounds of a server's log, without duplicates."""
    by_number = {int(n): RoundRecord(int(n), int(r), int(a), float(s)) for n, r, a, s in _ROUND.findall(log)}
    return [by_number[number] for number in sorted(by_number)]


def lost(rounds: Iterable[RoundRecord]) -> list[int]:
    """List the rounds in which an honest device's reply is missing."""
    return [record.number for record in rounds if record.replied < HONEST]


def processes(running: LocalFederation) -> dict[str, set[int]]:
    """Return process ids of the server and of the honest devices, by program."""
    homes = {str(running.server.home): ("server", SERVER)}
    homes |= {str(device.home): (name, DEVICE) for name, device in running.devices.items()}
    ids_of: dict[str, set[int]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            who, parts = homes.get(process.environ().get("ANTHER_HOME", ""), ("", ()))
            command_line = " ".join(process.cmdline())
            if part := next((part for part in parts if part in command_line), None):
                ids_of.setdefault(f"{who}: {part}", set()).add(process.pid)
    return ids_of


def exited(before: dict[str, set[int]], after: dict[str, set[int]]) -> list[str]:
    """List the programs that have exited since; a device's ClientApps and workers are expected to exit."""
    lasting = {
        name: ids
        for name, ids in before.items()
        if not name.endswith(("client.runtime.worker", "client.runtime.supernode"))
    }
    nodes = {
        name: {min(ids)} for name, ids in before.items() if name.endswith("client.runtime.supernode")
    }  # the others are its forks
    return [name for name, ids in {**lasting, **nodes}.items() if ids - after.get(name, set())]


def run_attacked(folder: Path, calls: int, calm: int, rate: float, seed: int) -> GatewayResults:
    """Run a federation before and under attack.

    Args:
        folder: folder of the federation.
        calls: number of hostile calls of eve and the stranger together.
        calm: rounds before the attack, and at least under it.
        rate: calls per second of each client.
        seed: seed of the attacks.
    """
    results = GatewayResults()
    pictures = write_letter_folders(folder / "pictures", HONEST, each=6)
    with federation(folder / "federation", RUN) as running:
        running.start()
        for name, data in pictures.items():
            running.enroll(name, data, "test=true").start()
        for name in ("mallory", "eve"):
            words = [f"data={pictures['owner-0']}", f"name={name}"]
            process = run_module("client.cli.enroll", *words, home=folder / name, stdin=running.ticket())
            assert process.returncode == 0, process.stderr
        signals = folder / "signals"
        signals.mkdir()
        share = {"eve": calls // 2, "stranger": calls - calls // 2, "mallory": 0}
        clients = {
            who: _client(who, signals, folder / ("eve" if who == "stranger" else who), running.port, count, rate, seed)
            for who, count in share.items()
        }
        try:
            _measure(running, clients, signals, calm, results)
        finally:
            for client in clients.values():
                client.stop()
    return results


def _client(who: str, signals: Path, home: Path, port: int, calls: int, rate: float, seed: int) -> ModuleProcess:
    base = assets.digest(assets.locate("glyphs"))
    words = [who, str(signals), "--home", str(home), "--port", str(port), "--base", base]
    more = ["--calls", str(calls), "--rate", str(rate), "--seed", str(seed)]
    return ModuleProcess("bench.robustness.fleet_attacks", [*words, *more], signals / who).start()


def _measure(
    running: LocalFederation, clients: dict[str, ModuleProcess], signals: Path, calm: int, results: GatewayResults
) -> None:
    wait_until(
        lambda: any(completed.asked > HONEST for completed in rounds(running.server.output)), 900, running.logs()
    )
    first = rounds(running.server.output)[-1].number
    wait_until(lambda: rounds(running.server.output)[-1].number >= first + calm, 3600, running.logs())
    processes_before, gateway = (
        processes(running),
        psutil.Process(running.server.process.pid if running.server.process else 0),
    )
    calm_memory, attack_began = gateway.memory_info().rss, rounds(running.server.output)[-1].number
    (signals / "attack").touch()
    while not all((signals / f"{who}.json").exists() for who in ("eve", "stranger")) or (
        rounds(running.server.output)[-1].number < attack_began + calm
    ):
        assert running.server.exit_code is None, running.logs()
        assert all(clients[who].exit_code in (None, 0) for who in clients), {
            who: record.output for who, record in clients.items()
        }
        results.memory_mib = max(results.memory_mib, (gateway.memory_info().rss - calm_memory) / 2**20)
        results.disk_mib = max(results.disk_mib, database_bytes(running) / 2**20)
        time.sleep(0.5)
    attack_ended = rounds(running.server.output)[-1].number
    (signals / "attack").unlink()
    wait_until(
        lambda: rounds(running.server.output)[-1].number > attack_ended + 1,
        600,
        f"a round afterwards\n{running.logs()}",
    )
    results.restarted = exited(processes_before, processes(running)) + (
        ["the run"] if "the run broke off" in running.server.output else []
    )
    (signals / "stop").touch()
    wait_until(lambda: (signals / "mallory.json").exists(), 120, clients["mallory"].output)
    completed = rounds(running.server.output)
    results.calm_seconds = [record.seconds for record in completed if first < record.number <= attack_began]
    attacked_rounds = [record for record in completed if attack_began < record.number <= attack_ended]
    results.seconds, results.lost = [record.seconds for record in attacked_rounds], lost(attacked_rounds)
    for who in clients:
        results.outcomes[who] = [tuple(row) for row in json.loads((signals / f"{who}.json").read_text())]
    results.calls = sum(count for rows in results.outcomes.values() for _, _, count in rows)


def database_bytes(running: LocalFederation) -> int:
    """Return the size of the SuperLink's database in bytes."""
    return database.size(running.server.home / "server" / "superlink.db")


def table(results: GatewayResults) -> Table:
    """Return a table with a row for each kind of call and a summary below."""
    shown = Table(title=f"{results.calls:,} calls", caption=summary(results))
    for heading in ("client", "call", "outcome"):
        shown.add_column(heading)
    for who, rows in results.outcomes.items():
        kinds: dict[str, Counter[str]] = {}
        for kind, outcome, count in rows:
            kinds.setdefault(kind, Counter())[outcome] += count
        for kind, outcomes_of in kinds.items():
            shown.add_row(who, kind, ", ".join(f"{outcome} × {count}" for outcome, count in outcomes_of.most_common()))
    return shown


def summary(results: GatewayResults) -> str:
    """Summarize the results in one line."""
    attacked_rounds, calm = median(results.seconds or [0.0]), median(results.calm_seconds or [0.0])
    return (
        f"rounds: {len(results.seconds)}, {len(results.lost)} without an honest reply; "
        f"median {attacked_rounds:.2f} s, calm {calm:.2f} s ({results.slower:.2f} ×); "
        f"gateway +{results.memory_mib:.0f} MiB; database {results.disk_mib:.0f} MiB; "
        f"restarted: {', '.join(results.restarted) or 'nothing'}"
    )


def main() -> int:
    """Run the benchmark, and return the exit status: 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--calm", type=int, default=CALM, help="rounds before the attack, and at least during it")
    parser.add_argument("--rate", type=float, default=RATE, help="calls per second of each client")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="anther-") as folder:
        results = run_attacked(Path(folder), args.calls, args.calm, args.rate, args.seed)
    record = {
        "command": f"python -m bench.robustness.gateway --calls {args.calls} --seed {args.seed}",
        "machine": machine(torch.device("cpu")),
        "versions": versions("flwr", "torch", "uvicorn"),
        **asdict(results),
        "slower": results.slower,
        "failures": results.failures(),
    }
    write(args.out, (json.dumps(record, indent=2) + "\n").encode())
    Console(width=140).print(table(results))
    for failure in results.failures():
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if results.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
