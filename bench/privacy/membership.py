"""Membership inference against shared adapters, with and without differential privacy.

    anther bench membership [--seeds 0 1 2] [--jobs 1] [key=value …]

Runs the attacks of `simulations.audit.run` against the shared adapters of `bench.quality.utility`, which are trained
first if missing: without privacy and at ε = 8 per image, with the same writers, pictures, rounds and steps. As a
positive control, it also attacks an intentionally overfitted adapter of development writers:

    open        the private form without its noise                    example-8   ε = 8 per image
    reference   the best shared adapter without privacy
    overfitted  four writers, rank 32, 800 steps on 20 pictures each; its last round, not its best

The page with plots is written to --runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.quality.utility import COMMON, FORMS, TEST, command, run
from conf.schemas.audit import AuditConfig, MembershipConfig
from privacy.audit.membership import MembershipResult
from simulations.audit.membership import RunGroup
from simulations.audit.page import AuditResults, write
from simulations.audit.run import run_groups

FORMS_ATTACKED = ("open", "example-8", "reference")
OVERFITTED = (
    "aggregation=fedit",
    "adapter.shared.lr_schedule=cosine",
    "rounds=40",
    "adapter.shared.steps=20",
    "adapter.shared.rank=32",
    "adapter.shared.batch_size=5",
    "adapter.shared.lr=0.003",
    "data.role=development",
    "data.writers=4",
    "data.train=20",
    "seed=0",
)


def run_overfitted(folder: Path, overrides: Sequence[str]) -> Path:
    """Run the intentionally overfitted federation, and return its folder."""
    run([sys.executable, "-m", "simulations.run", *COMMON, *OVERFITTED, "cohort.eval_size=4", *overrides], folder)
    return folder


def run_attacks(folders: Sequence[Path], adapter: str) -> RunGroup:
    """Run all attacks on runs that differ only in their seed."""
    (group,) = run_groups(AuditConfig(runs=[*map(str, folders)], membership=MembershipConfig(adapter=adapter)))
    return group


def record(tried: Mapping[str, RunGroup]) -> dict[str, Any]:
    """Return AUC and true positive rate at 1 % false positives of each attack, by arm."""
    return {
        name: {
            "trained": arm.name,
            "writers": arm.writers,
            "attacks": {attack: _attack(result) for attack, result in arm.attacks.items()},
        }
        for name, arm in tried.items()
    }


def _attack(membership: MembershipResult) -> dict[str, Any]:
    numbers = {"auc": membership.auc._asdict(), "tpr_at_1_percent_fpr": membership.tpr._asdict()}
    return {"members": membership.members, "others": membership.others, **numbers}


def table(recorded: Mapping[str, Any]) -> Table:
    """Return a table with a row for each arm and attack."""
    shown = Table(title="membership inference [95 %, bootstrapped over writers]")
    for heading in ("adapter", "attack", "members", "others", "AUC", "true positive rate at 1 % false positives"):
        shown.add_column(heading, justify="left" if heading in ("adapter", "attack") else "right")
    for name, arm in recorded.items():
        for index, (attack, result) in enumerate(arm["attacks"].items()):
            numbers = (
                f"{run_form['value']:.3f} [{run_form['low']:.3f}, {run_form['high']:.3f}]"
                for run_form in (result["auc"], result["tpr_at_1_percent_fpr"])
            )
            shown.add_row("" if index else name, attack, str(result["members"]), str(result["others"]), *numbers)
        shown.add_section()
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel")
    parser.add_argument("--runs", type=Path, default=Path("outputs/utility"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/membership.json"))
    arguments, overrides = parser.parse_known_args()

    def run_form(name: str, seed: int) -> Path:
        folder: Path = arguments.runs / "test" / f"{TEST.writers}x{TEST.pictures}" / f"{name}-{seed}"
        run(command(FORMS[name], seed, TEST, tune=False, overrides=overrides), folder)
        return folder

    with ThreadPoolExecutor(arguments.jobs) as pool:
        overfitted = pool.submit(run_overfitted, arguments.runs / "overfitted", overrides)
        folders = {
            name: list(pool.map(run_form, [name] * len(arguments.seeds), arguments.seeds)) for name in FORMS_ATTACKED
        }
        folders["overfitted"] = [overfitted.result()]
    groups = {
        name: run_attacks(run_folders, "last" if name == "overfitted" else "best")
        for name, run_folders in folders.items()
    }
    command_line = " ".join(["python -m bench.privacy.membership", *sys.argv[1:]])
    write(AuditResults(run_groups=list(groups.values())), AuditConfig(), arguments.runs, command_line)
    recorded = record(groups)
    arguments.out.write_text(
        json.dumps(
            {
                "command": command_line,
                "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
                "versions": versions("torch", "diffusers", "flwr"),
                "arms": recorded,
            },
            indent=2,
        )
        + "\n"
    )
    Console(width=160).print(table(recorded))


if __name__ == "__main__":
    main()
