"""What can this device train?  anther device plan base=sd15 device=pi4_2gb

The best plan that fits a device's memory, time and battery, predicted without weights, and the rungs of the ladder
above and below it with what stands against them. `base` is a full-size configuration by its name, a folder or a
shipped base; `device` a profile of conf/device, or `this`, as `anther device benchmark` found it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from client.planning.plan_search import (
    FootprintPredictor,
    TrainingOption,
    TrainingSetting,
    exceeds_memory,
    search_plans,
    settings,
)
from common.errors import REPORTED_ERRORS, AntherError, told
from common.units import HOUR, MIB
from conf.schemas.planning import PlanConfig, compose_plan, devices
from models.base import assets
from models.families.family import ATTENTION
from models.families.flux import FLUX
from models.families.known import BaseSpec, find_base
from models.families.sd3 import SD3
from models.footprint.footprint import Footprint, example_shapes, footprint, meta_denoiser, resident_bytes
from models.quantization.modes import WEIGHT_MODES

DONE, USAGE = 0, 2
PROFILE = "device.yaml"  # of this device, in ANTHER_HOME
WIDTH = 100
SITES = {"attention": ATTENTION, "cross": r".*\.attn2\.to_(q|k|v|out\.0)"}
JOINT = (SD3, FLUX)  # text and picture are one sequence there: no layers attend to the text alone
SMALLEST = 256  # side in pixels of the smallest pictures that are planned for, of a base that was made for larger ones
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the side that a base was made for


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="anther device plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"devices: this, {', '.join(devices())}; all keys: conf/schemas/planning.py",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="base, device, rank, steps, pictures, …")
    parser.add_argument("--json", action="store_true", help="the rungs as JSON")
    asked = parser.parse_args(arguments)
    try:
        plan = compose_plan(asked.overrides, assets.home() / PROFILE)
        base = find_base(plan.base)
        rungs, best = search_plans(ways(base), plan, predictor(base, plan))
    except REPORTED_ERRORS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return USAGE
    print(json.dumps(as_plain(rungs, best, plan), indent=2) if asked.json else in_words(rungs, best, plan))
    return DONE


def ways(base: BaseSpec) -> list[TrainingSetting]:
    """Every way in which a base could be trained, from the best down."""
    _, side, patch = base.family.latents(base.full_config())
    if side is None:
        raise AntherError(f"its {base.family.network}'s config.json says no sample_size: add it, in latents")
    step = max(8, patch) * base.scale if base.family.network == "unet" else patch * base.scale
    sides = [int(side * base.scale * share) for share in SHARES]
    smaller = [side for side in sides[1:] if side >= SMALLEST and side % step == 0]
    sites = ["attention"] if base.family in JOINT else SITES
    return settings([sides[0], *smaller], list(sites), list(WEIGHT_MODES))


def predictor(base: BaseSpec, plan: PlanConfig) -> FootprintPredictor:
    """Footprints of a base's settings on the plan's device, each predicted once.

    No pass is run of a base that is too large by itself: its footprint is the least that it takes.
    """
    runtime = int(plan.device.runtime_mib * MIB)

    @cache
    def predict(setting: TrainingSetting) -> Footprint:
        held = meta_denoiser(
            base, sites=SITES[setting.sites], weights=setting.weights, checkpointing=setting.checkpointing
        )
        alone = Footprint(base_bytes=resident_bytes(held), runtime_bytes=runtime)
        if exceeds_memory(alone, plan.device):
            return alone
        latents, context = example_shapes(base, setting.resolution)
        return footprint(held, latents, context, rank=plan.rank, batch=setting.batch, runtime_bytes=runtime)

    return predict


def as_plain(rungs: Sequence[TrainingOption], best: int | None, plan: PlanConfig) -> dict[str, Any]:
    """All of it as plain values."""
    found = [
        {
            **dataclasses.asdict(rung),
            "peak_bytes": rung.footprint.peak_bytes,
            "battery_share": rung.battery_share(plan.device),
        }
        for rung in rungs
    ]
    return {"plan": dataclasses.asdict(plan), "best": best, "rungs": found}


def in_words(rungs: Sequence[TrainingOption], best: int | None, plan: PlanConfig) -> str:
    """A table of the rungs around the best one, and what its memory is made of."""
    from rich import box  # slow imports, so only here
    from rich.console import Console, Group
    from rich.table import Table

    pictures = "1 picture" if plan.batch_size == 1 else f"{plan.batch_size} pictures"
    device = f"{plan.device.name}: {plan.device.memory_gib:g} GiB"
    table = Table(
        title=f"{Path(plan.base).name} on {device}, rank {plan.rank}, {pictures} a step",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for heading in ("", "pixels", "sites", "base", "recompute"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MiB", "s/step", "steps", "hours", "Wh"):
        table.add_column(heading, justify="right")
    table.add_column("what blocks it", no_wrap=True)
    for place in shown(len(rungs), best, plan.alternatives):
        rung, setting = rungs[place], rungs[place].setting
        costs = [""] * 4
        if rung.seconds:
            hours, joules = rung.steps * rung.seconds / HOUR, rung.steps * rung.joules
            costs = [f"{rung.seconds:.1f}", str(rung.steps), f"{hours:.1f}", f"{joules / HOUR:.1f}"]
        least = "" if rung.footprint.activations_bytes else "≥ "  # no pass was run
        size = f"{least}{rung.footprint.peak_bytes / MIB:,.0f}"
        style = "bold" if place == best else "dim" if rung.blocked else ""
        table.add_row(
            "▸" if place == best else "",
            f"{setting.resolution}²",
            setting.sites,
            setting.weights,
            setting.checkpointing,
            size,
            *costs,
            rung.blocked or "",
            style=style,
        )
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with console.capture() as captured:
        console.print(Group(table, "", *_below(rungs, best, plan)), highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def shown(count: int, best: int | None, around: int) -> range:
    """Which of so many rungs: the best and those around it; if there is no best, the lowest."""
    if best is None:
        return range(max(0, count - around), count)
    return range(max(0, best - around), min(count, best + around + 1))


def _below(rungs: Sequence[TrainingOption], best: int | None, plan: PlanConfig) -> list[str]:
    """What the best plan's memory is made of, and what training draws beyond idling."""
    if best is None:
        return ["Nothing fits: a smaller base, or another device."]
    found, device = rungs[best], plan.device
    parts = [
        f"{name.removesuffix('_bytes')} {value / MIB:.0f}"
        for name, value in vars(found.footprint).items()
        if name.endswith("_bytes") and name != "moved_bytes" and value
    ]
    extra = found.steps * found.seconds * (device.watts_busy - device.watts_idle) / HOUR
    share = found.battery_share(device)
    energy = f"{extra:.1f} of its Wh are beyond what the device draws idle"
    lines = [
        f"MiB of ▸: {', '.join(parts)}.",
        f"{energy}." if share is None else f"{energy}; all of them are {share:.0%} of a battery.",
    ]
    if found.setting.batch > 1:
        lines.append(f"Its step takes {found.setting.batch} pictures at a time.")
    if found.setting.weights != "fp32":
        lines.append("A base in few bits is packed once (anther pack), and read from its file as it is used.")
    return [*lines, "Predictions, from a profile's rates: nothing was run."]


if __name__ == "__main__":
    sys.exit(main())
