"""What can this device train?  python -m client.plan base=sd15 device=pi4_2gb

The best plan that fits a device's memory, time and battery, predicted without weights, and the rungs of the ladder
above and below it with what stands against them. `base` is a full-size configuration by its name, a folder or a
shipped base; `device` a profile of conf/device, or `this`, as `python -m client.benchmark` found it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from client.ladder import HOUR, MIB, Predict, Rung, Setting, ladder, qualities
from conf.errors import AntherError
from conf.planning import DeviceProfile, Plan, devices, planned
from models import assets
from models.families.family import ATTENTION
from models.families.flux import FLUX
from models.families.known import Known, find
from models.families.sd3 import SD3
from models.footprint import Footprint, example, footprint, shapes
from models.weights import MODES

DONE, USAGE = 0, 2
PROFILE = "device.yaml"  # of this device, in ANTHER_HOME
WIDTH = 130
SITES = {"attention": ATTENTION, "cross": r".*\.attn2\.to_(q|k|v|out\.0)"}
JOINT = (SD3, FLUX)  # text and picture are one sequence there: no layers attend to the text alone
SMALLEST = 256  # side in pixels of the smallest pictures that are planned for, of a base that was made for larger ones
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the side that a base was made for


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m client.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"devices: this, {', '.join(devices())}; all keys: conf/planning.py",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="base, device, rank, steps, pictures, …")
    parser.add_argument("--json", action="store_true", help="the rungs as JSON")
    asked = parser.parse_args(arguments)
    try:
        plan = planned(asked.overrides, assets.home() / PROFILE)
        base = find(plan.base)
        rungs, best = ladder(settings(base), plan, predictor(base, plan))
    except AntherError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    print(json.dumps(as_plain(rungs, best, plan), indent=2) if asked.json else in_words(rungs, best, plan))
    return DONE


def settings(base: Known) -> list[Setting]:
    """Every quality in which a base could be trained, from the best down."""
    _, side, patch = base.family.latents(base.whole_config())
    step = max(8, patch) * base.scale if base.family.network == "unet" else patch * base.scale
    sides = [int(side * base.scale * share) for share in SHARES]
    smaller = [side for side in sides[1:] if side >= SMALLEST and side % step == 0]
    sites = ["attention"] if base.family in JOINT else SITES
    return qualities([sides[0], *smaller], list(sites), list(MODES))


def predictor(base: Known, plan: Plan) -> Predict:
    """Footprints of a base's settings on the plan's device, each predicted once."""

    @cache
    def predict(setting: Setting) -> Footprint:
        held = shapes(base, sites=SITES[setting.sites], weights=setting.weights, checkpointing=setting.checkpointing)
        return footprint(
            held, *example(base, setting.resolution), rank=plan.rank, batch=setting.batch,
            runtime_bytes=int(plan.device.runtime_mib * MIB),
        )  # fmt: skip

    return predict


def as_plain(rungs: Sequence[Rung], best: int | None, plan: Plan) -> dict[str, Any]:
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


def in_words(rungs: Sequence[Rung], best: int | None, plan: Plan) -> str:
    """A table of the rungs around the best one, and what its memory is made of."""
    from rich.console import Console, Group  # slow imports, so only here
    from rich.table import Table

    device = plan.device
    table = Table(title=f"{plan.base} on {device.name}, {device.memory_gib:g} GiB", title_justify="left")
    for heading in ("", "pixels", "sites", "base", "checkpoints", "batch"):
        table.add_column(heading)
    for heading in ("MiB", "s/step", "steps", "hours", "Wh", "battery"):
        table.add_column(heading, justify="right")
    table.add_column("what blocks it")
    for place in shown(len(rungs), best, plan.rungs):
        rung, setting = rungs[place], rungs[place].setting
        share, hours = rung.battery_share(device), rung.steps * rung.seconds / HOUR
        table.add_row(
            "▸" if place == best else "", f"{setting.resolution}²", setting.sites, setting.weights,
            setting.checkpointing, str(setting.batch), f"{rung.footprint.peak_bytes / MIB:,.0f}", f"{rung.seconds:.1f}",
            str(rung.steps), f"{hours:.1f}", f"{rung.steps * rung.joules / HOUR:.1f}",
            "–" if share is None else f"{share:.0%}", rung.blocked or "",
            style="bold" if place == best else "",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with console.capture() as captured:
        console.print(Group(table, *_below(rungs, best, device)), highlight=False)
    return captured.get().rstrip("\n")


def shown(count: int, best: int | None, around: int) -> range:
    """Which of so many rungs: the best and those around it; if there is no best, the lowest."""
    if best is None:
        return range(max(0, count - around), count)
    return range(max(0, best - around), min(count, best + around + 1))


def _below(rungs: Sequence[Rung], best: int | None, device: DeviceProfile) -> list[str]:
    """What the best plan's memory is made of, and what training draws beyond idling."""
    if best is None:
        return ["Nothing fits: a smaller base, or another device."]
    found = rungs[best]
    parts = [
        f"{name.removesuffix('_bytes')} {value / MIB:.0f}"
        for name, value in vars(found.footprint).items()
        if name.endswith("_bytes") and name != "moved_bytes"
    ]
    extra = found.steps * found.seconds * (device.watts_busy - device.watts_idle) / HOUR
    return [
        f"Memory in MiB: {', '.join(parts)}.",
        f"Of the energy, {extra:.1f} Wh are beyond what the device draws idle. Predictions, from a profile's rates.",
    ]


if __name__ == "__main__":
    sys.exit(main())
