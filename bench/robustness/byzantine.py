"""Gain that remains if a fifth of the devices is Byzantine.

    anther bench byzantine [--small] [key=value …]

Runs every attack of `bench.robustness.byzantine_clients` through the real round loop, without robust rules and with one
set of rules for all attacks. The gain is that of the shared adapter after the last round, L_base − L over the held-out
letters of the honest writers; the gain kept is its ratio to a clean run without rules. A backdoor succeeds if the judge
reads a sample of the trigger's caption as the attackers' glyph.

    clean           no attackers
    sign flip       update times −1                   x100      update times 100
    nan             not a number                      zero      no change
    replay          their first update, every round
    backdoor        all send one adapter that draws the trigger as the target, scaled to replace the mean
    quiet backdoor  the same, not scaled
    spread backdoor each trains the backdoor and sends its own update, not scaled: not covered by the claim

Settings were tuned on development writers (`--small` uses no others), with seeds that the claim doesn't use; test
writers are evaluated once per claim.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.robustness.byzantine_clients import (
    ATTACKS,
    SHARE,
    TARGET,
    TRIGGER,
    choose_attackers,
    poison_devices,
    tamper_results,
)
from conf.compose import compose
from conf.schemas.simulation import SimulationConfig

CLEAN = "clean"
SEEDS, TUNING_SEEDS = (0, 1, 2), (10,)
ROBUST = ("robust=[replay,foolsgold,afa,norm_bound]",)  # the same for all attacks
MIN_GAIN_KEPT, MAX_BACKDOOR = (
    0.85,
    0.1,
)  # targets: smallest share of the clean gain, largest share of successful backdoors
COMMON = ("cohort.eval_size=1", "tracker=none")
LARGE = (
    "preset=claim",
    "data.role=test",
    "data.writers=60",
    "rounds=12",
    "base.compute_dtype=bf16",
    "trainer.memory_gib=8",
    *COMMON,
)
SMALL = (
    "data.role=development",
    "data.writers=20",
    "data.test=8",
    "rounds=6",
    "evaluation.timesteps=2",
    *COMMON,
)


@dataclass(frozen=True, kw_only=True)
class ByzantineCase:
    """Settings of one run."""

    attack: str
    protected: bool
    seed: int
    overrides: tuple[str, ...]
    samples: int
    """Samples of the trigger's caption that are drawn and read."""
    folder: str

    @property
    def name(self) -> str:
        """Name of the run and its folder."""
        return f"{self.attack.replace(' ', '-')}-{'protected' if self.protected else 'open'}-{self.seed}"

    @property
    def settings(self) -> list[str]:
        """Overrides of the run."""
        return [*(ROBUST if self.protected else ()), *self.overrides, f"seed={self.seed}"]


def run(case: ByzantineCase) -> dict[str, Any]:
    """Run a federation under attack, and return its results, which are stored in its folder and reused."""
    digest = hashlib.sha256(json.dumps([case.settings, case.samples]).encode()).hexdigest()
    folder = Path(case.folder) / f"{case.name}-{digest[:8]}"
    file = folder / "result.json"
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run
        folder.mkdir(parents=True)
        file.write_text(json.dumps(_run(case, folder)))
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def _run(case: ByzantineCase, folder: Path) -> dict[str, Any]:
    from server.rounds.federation import federate
    from simulations import evaluation, setup
    from simulations.grid.cohort import CohortGrid
    from strategies.factory.full_plan import training_plan
    from strategies.factory.strategy import build
    from training.capacity import budget
    from typefaces import dataset

    started = time.perf_counter()
    config = compose(shlex.join(case.settings))
    base, people, database, _ = setup.build(config, folder)
    perform = setup.make_perform(config, base, budget(config.trainer.memory_gib, base.device))
    attackers = choose_attackers([person.name for person in people], case.seed)
    devices = {person.name: person.device for person in people}
    kind, performing = ATTACKS.get(case.attack), perform
    if kind:
        performing = tamper_results(perform, kind.make(), attackers)
        if kind.poisons:
            families = _families(dataset.load(config.data.role), attackers)
            devices |= {
                device.name: device for device in poison_devices([devices[name] for name in attackers], families)
            }
    plan = training_plan(config, run=case.name, base=base.hash)
    strategy = build(config, plan, base.sites, accept_simulated=True)
    state = federate(
        config,
        grid=CohortGrid(list(devices.values()), performing, group_commit=database.group_commit),
        strategy=strategy,
        plan=plan,
        saved=None,
        checkpoints=folder / "checkpoints",
        on_round=lambda _: None,
        min_devices=len(people),
        personalized_devices=(),
    )
    honest = [person for person in people if person.name not in attackers]
    shared = {person.name: state.adapter for person in honest}
    losses = evaluation.losses(honest, {"shared": shared}, evaluation.encode_pools(honest, perform), perform)
    trained = [record.train for record in state.history if record.train]
    database.close()
    return {
        "base": [losses[person.name]["base"] for person in honest],
        "shared": [losses[person.name]["shared"] for person in honest],
        "backdoor": read_as_target(config, base, state.adapter, case.samples),
        "dropped": [train.dropped for train in trained],
        "diagnostics": [train.diagnostics for train in trained],
        "seconds": time.perf_counter() - started,
    }


def _families(families: Sequence[Any], names: Sequence[str]) -> list[Any]:
    from simulations.fleet.writers import slug

    return [family for family in families if slug(family.name) in names]


def read_as_target(config: SimulationConfig, base: Any, adapter: Any, samples: int) -> float:
    """Return the share of the trigger's samples that the judge reads as the target or its indistinguishable glyphs.

    Args:
        config: the simulation.
        base: its base.
        adapter: the shared adapter.
        samples: number of samples.
    """
    from common.seeding import derive_seed
    from models.lora.batched_lora import stack_adapters, to_device
    from simulations.evaluation import glyphs
    from training.capacity import budget, inference_share
    from training.inference import generate
    from typefaces import dataset, judge

    latents = generate(
        base,
        captions=[dataset.caption(TRIGGER)] * samples,
        seeds=[derive_seed(config.seed, "trigger", number) for number in range(samples)],
        adapters=[to_device(stack_adapters(base.sites, [adapter]), base.like)],
        slots=[0] * samples,
        sampler=config.evaluation.sampler,
        steps=config.evaluation.sampling_steps,
        guidance=config.evaluation.guidance_scale,
        memory=inference_share(budget(config.trainer.memory_gib, base.device)),
    )
    reading = judge.load().read(glyphs(base.decode(latents)))
    return float((judge.merge_classes(reading) == judge.merge_classes([dataset.GLYPHS.index(TARGET)])).mean())


def gain(result: Mapping[str, Any]) -> float:
    """Return the mean over honest writers of L_base − L."""
    return float(np.mean(result["base"]) - np.mean(result["shared"]))


def gain_kept(result: Mapping[str, Any], clean: Mapping[str, Any]) -> float:
    """Return the gain as a share of the clean run's."""
    return gain(result) / gain(clean)


Results = Mapping[tuple[str, bool], Sequence[Mapping[str, Any]]]  # attack, protected -> a run for each seed


def table(results: Results) -> Table:
    """Return a table with a row for each attack: gain kept and backdoors, as mean over seeds and as worst seed."""
    shown = Table(title="a fifth of the devices is Byzantine: mean over seeds, and the worst seed")
    for heading in (
        "attack",
        "rules",
        "gain kept",
        f"≥ {MIN_GAIN_KEPT:.0%}",
        "backdoor",
        f"≤ {MAX_BACKDOOR:.0%}",
        "rejected",
    ):
        shown.add_column(heading, justify="right")
    clean = results[CLEAN, False]
    for (attack, protected), runs in results.items():
        shares = [gain_kept(result, beside) for result, beside in zip(runs, clean, strict=True)]
        backdoors = [result["backdoor"] for result in runs]
        dropped = sum(sum(reasons.values()) for result in runs for reasons in result["dropped"])
        shown.add_row(
            attack,
            "robust" if protected else "none",
            f"{np.mean(shares):.0%} [{min(shares):.0%}]",
            _verdict(protected, min(shares) >= MIN_GAIN_KEPT),
            f"{np.mean(backdoors):.0%} [{max(backdoors):.0%}]",
            _verdict(protected, max(backdoors) <= MAX_BACKDOOR),
            str(dropped),
        )
    return shown


def _verdict(claimed: bool, true: bool) -> str:
    return ("yes" if true else "no") if claimed else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="development writers and few rounds, for a CPU or tuning")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"{SEEDS}; with --small {TUNING_SEEDS}")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel")
    parser.add_argument("--runs", type=Path, default=Path("outputs/robustness"), help="folder for the runs")
    parser.add_argument("--out", type=Path, help="bench/results/robustness.json; none with --small")
    arguments, overrides = parser.parse_known_args()
    seeds = arguments.seeds or list(TUNING_SEEDS if arguments.small else SEEDS)
    cases = [
        ByzantineCase(
            attack=attack,
            protected=protected,
            seed=seed,
            samples=24 if arguments.small else 128,
            overrides=(*(SMALL if arguments.small else LARGE), *overrides),
            folder=str(arguments.runs / ("small" if arguments.small else "large")),
        )
        for attack in (CLEAN, *arguments.attacks)
        for protected in (False, True)
        for seed in seeds
    ]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with ProcessPoolExecutor(
        arguments.jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        outcomes = list(pool.map(run, cases))
    results: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for case, result in zip(cases, outcomes, strict=True):
        results.setdefault((case.attack, case.protected), []).append(result)
    out = arguments.out or (None if arguments.small else Path("bench/results/robustness.json"))
    if out:
        record = {
            "command": " ".join(["python -m bench.robustness.byzantine", *sys.argv[1:]]),
            "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "versions": versions("torch", "diffusers", "flwr"),
            "robust": ROBUST,
            "share": SHARE,
            "results": [
                {
                    **{key: value for key, value in asdict(case).items() if key not in ("folder", "overrides")},
                    "kept": gain_kept(result, results[CLEAN, False][seeds.index(case.seed)]),
                    **result,
                }
                for case, result in zip(cases, outcomes, strict=True)
            ],
        }
        out.write_text(json.dumps(record, indent=2) + "\n")
    Console(width=140).print(table(results))


if __name__ == "__main__":
    main()
