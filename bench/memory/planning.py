"""Trainable sites of devices with little memory, and the time to plan for a fleet.

    anther bench planning [--base sd15] [--weights nf4] …

For each memory budget, the table shows the set of sites that a device is planned to train, with equal gains per site.
It is compared with all sites or none, the only choices of a plan without sets of sites. The memory of every set is
predicted from the same two dry runs, and compared with a dry run of the set itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from common.units import GIB, MIB
from models.diffusion.denoiser import Denoiser
from models.families.known import BaseSpec, find_base
from models.footprint.footprint import CHECKPOINTING_MODES, MARGIN, Footprint, example_shapes, footprint, meta_denoiser
from models.footprint.site_costs import PassCosts, pass_costs
from models.lora.adapter import Adapter, init_adapter
from models.quantization.modes import WEIGHT_MODES
from protocol.messages import DeviceReport, TrainingPlan
from strategies.planning.knapsack import SiteSet
from strategies.planning.plan import PlanLimits
from strategies.planning.planner import Planner
from strategies.planning.site_selection import RUNTIME, SiteSelector, best_plan

T = TypeVar("T")
REPORT = DeviceReport(
    device="a",
    base="b",
    profile="p",
    memory_gib=1.0,
    examples_per_second=0.1,
    watts=5.0,
    uplink_mbps=10.0,
    downlink_mbps=50.0,
)


def time_cpu(work: Callable[[], T]) -> tuple[T, float]:
    """Run `work`, and return its result and CPU seconds."""
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def result_row(budget: int, site_set: SiteSet | None, costs: PassCosts, exact: Footprint | None) -> dict[str, Any]:
    """Compute the row of one memory budget.

    Args:
        budget: memory of the device in MiB.
        site_set: the chosen set of sites; None: no set fits.
        costs: costs of all sites.
        exact: footprint from a dry run of the set.
    """
    names = [site.name for site in costs.sites]
    all_fit = MARGIN * (RUNTIME + costs.bytes(names)) <= budget * MIB
    result = {"budget_mib": budget, "all_or_nothing": float(all_fit), "sites": 0, "gain": 0.0}
    if site_set is None or exact is None:
        return result
    return result | {
        "sites": len(site_set.sites),
        "gain": site_set.gain,
        "work": site_set.work,
        "predicted_mib": (RUNTIME + site_set.bytes) / MIB,
        "exact_mib": (RUNTIME + exact.peak_bytes) / MIB,
    }


def result_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for each budget."""
    table = Table(title=title)
    for heading in ("MiB", "sites", "gain per step", "all or nothing", "time of a pass", "predicted MiB", "exact MiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row['budget_mib']:,}", str(row["sites"]), f"{row['gain']:.0%}", f"{row['all_or_nothing']:.0%}"]
        if row["sites"]:
            cells += [f"{row['work']:.0%}", f"{row['predicted_mib']:,.0f}", f"{row['exact_mib']:,.0f}"]
        table.add_row(*cells)
    return table


def make_fleet(devices: int) -> list[DeviceReport]:
    """Create reports of devices of ten types."""
    return [
        replace(REPORT, device=f"d{i}", memory_gib=0.6 + 0.05 * (i % 10), examples_per_second=0.1 + 0.02 * (i % 10))
        for i in range(devices)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="sd15")
    parser.add_argument("--weights", choices=WEIGHT_MODES, default="nf4")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING_MODES, default="block")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--budgets", type=int, nargs="+", default=[675, 725, 775, 825, 875, 900], help="total MiB")
    parser.add_argument("--devices", type=int, default=500, help="devices of the fleet")
    parser.add_argument("--out", type=Path, default=Path("bench/results/planning.json"))
    args = parser.parse_args()
    known: BaseSpec = find_base(args.base)
    sizes = example_shapes(known, args.resolution)

    def base() -> Denoiser:
        return meta_denoiser(known, sites=known.family.sites, weights=args.weights, checkpointing=args.checkpointing)

    costs, costs_seconds = time_cpu(lambda: pass_costs(base(), *sizes, rank=args.rank))
    sites = base().sites
    adapter: Adapter = init_adapter(sites, args.rank, seed=0)
    selector = SiteSelector(costs=costs)
    site_sets, choices_seconds = time_cpu(lambda: selector.site_sets(adapter))
    plan = TrainingPlan(run="r", round=1, base="b", rank=args.rank, steps=20, batch_size=1, learning_rate=1e-3)
    rows = []
    for budget in args.budgets:
        report = replace(REPORT, memory_gib=budget * MIB / GIB)
        best = best_plan(report, plan, PlanLimits(), selector, site_sets, sites=sites, download=0)
        trained = best and (best[0].sites or tuple(sites))
        choice = next((one for one in site_sets if set(one.sites) == set(trained or ())), None)
        exact = footprint(base(), *sizes, rank=args.rank, sites=trained) if trained else None
        rows.append(result_row(budget, choice, costs, exact))
    planner = Planner(sites=sites, limits=PlanLimits(deadline=150.0), method=selector)
    _, plans_seconds = time_cpu(lambda: planner.plans(make_fleet(args.devices), plan, adapter=adapter, download=10**6))
    seconds = {"costs, once a run": costs_seconds, "sets, once a round": choices_seconds, "a round": plans_seconds}
    title = f"{args.base} in {args.weights}, {args.resolution}², rank {args.rank}, checkpoints {args.checkpointing}"
    Console().print(result_table(title, rows))
    Console().print(f"CPU seconds for {args.devices} devices:", ", ".join(f"{k} {v:.2f}" for k, v in seconds.items()))
    record = {
        "command": f"python -m bench.memory.planning --base {args.base} --weights {args.weights} --checkpointing "
        f"{args.checkpointing} --resolution {args.resolution} --rank {args.rank} --budgets "
        f"{' '.join(map(str, args.budgets))} --devices {args.devices}",
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "diffusers"),
        "margin": MARGIN,
        "rows": rows,
        "seconds": seconds,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
