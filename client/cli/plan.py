"""Predict how a device can train:  anther plan base=sd15 device=pi4_2gb

Prints the best plan that fits the device's memory, time and battery, and the options above and below it with their
limits. Nothing is trained and no weights are needed. `base` is the name of a full-size configuration, a folder, or a
shipped base. `device` is a profile of conf/device, or `this`: this device, as measured by `anther device benchmark`.
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

from client.cli.common import allow_owned_plugins
from client.planning.plan_search import (
    FootprintPredictor,
    TrainingOption,
    TrainingSetting,
    exceeds_memory,
    search_plans,
    settings,
)
from common.errors import REPORTED_ERRORS, AntherError, describe_error
from common.units import HOUR, MIB
from conf.key_help import key_help
from conf.schemas.planning import PlanConfig, compose_plan, devices
from models.diffusion.sites import SITE_NAMES
from models.families.known import BaseSpec, find_base
from models.files import assets
from models.footprint.footprint import Footprint, example_shapes, footprint, meta_denoiser, resident_bytes
from models.quantization.modes import WEIGHT_MODES

DONE, USAGE = 0, 2
PROFILE = "device.yaml"  # profile of this device, in ANTHER_HOME
WIDTH = 100
CROSS = "cross"  # name of the smallest set of sites
MIN_SIDE = 256  # smallest side in pixels that is considered for a base made for larger pictures
SHARES = (1.0, 0.75, 0.5, 0.25)  # fractions of the side that a base was made for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="anther plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"devices: this, {', '.join(devices())}\n\n"
        f"keys (key=value), with their defaults:\n\n{key_help(PlanConfig)}",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="base, device, rank, steps, batch_size, …")
    parser.add_argument("--json", action="store_true", help="print the options as JSON")
    options = parser.parse_args(arguments)
    try:
        allow_owned_plugins()
        plan = compose_plan(options.overrides, assets.home() / PROFILE)
        base = find_base(plan.base)
        ranked, best = search_plans(training_settings(base, plan.sites), plan, predictor(base, plan))
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return USAGE
    print(json.dumps(as_plain(ranked, best, plan), indent=2) if options.json else in_words(ranked, best, plan))
    return DONE


def training_settings(base: BaseSpec, sites: str | None = None) -> list[TrainingSetting]:
    """List every way in which a base could be trained, best first.

    Args:
        base: published base, or base of a folder.
        sites: the largest set of sites, see `models.diffusion.sites`.
    """
    _, side, patch = base.family.latents(base.full_config())
    if side is None:
        raise AntherError(f"{base.family.network}/config.json: no sample_size: add it, in latent pixels")
    step = max(8, patch) * base.scale if base.family.network == "unet" else patch * base.scale
    sides = [int(side * base.scale * share) for share in SHARES]
    smaller = [side for side in sides[1:] if side >= MIN_SIDE and side % step == 0]
    return settings([sides[0], *smaller], _sets_of_sites(base, sites or "attention"), list(WEIGHT_MODES))


def _sets_of_sites(base: BaseSpec, largest: str) -> list[str]:
    """Return the sets that are tried, from the largest. An expression has no smaller set: it may not contain one."""
    if largest not in SITE_NAMES:
        return [largest]
    smaller = SITE_NAMES[: SITE_NAMES.index(largest) + 1][::-1]
    return [*smaller] if base.family.joint_attention else [*smaller, CROSS]


def site_pattern(name: str) -> str:
    """Return the sites of a setting as `adapter.sites` takes them."""
    return r".*\.attn2\.to_(q|k|v|out\.0)" if name == CROSS else name


def predictor(base: BaseSpec, plan: PlanConfig) -> FootprintPredictor:
    """Return a function that predicts the footprint of a setting on the plan's device; results are cached.

    If the base itself exceeds the memory, no pass is computed, and its footprint is a lower bound.
    """
    runtime = int(plan.device.runtime_mib * MIB)

    @cache
    def predict(setting: TrainingSetting) -> Footprint:
        layers = meta_denoiser(
            base, sites=site_pattern(setting.sites), weights=setting.weights, checkpointing=setting.checkpointing
        )
        base_only = Footprint(base_bytes=resident_bytes(layers), runtime_bytes=runtime)
        if exceeds_memory(base_only, plan.device):
            return base_only
        latents, context = example_shapes(base, setting.resolution)
        return footprint(layers, latents, context, rank=plan.rank, batch=setting.batch, runtime_bytes=runtime)

    return predict


def as_plain(options: Sequence[TrainingOption], best: int | None, plan: PlanConfig) -> dict[str, Any]:
    """Return everything as plain values, for JSON.

    Args:
        options: the options from best to leanest.
        best: index of the best feasible option; None: none is feasible.
        plan: the configuration of the search.
    """
    entries = [
        {
            **dataclasses.asdict(option),
            "peak_bytes": option.footprint.peak_bytes,
            "battery_share": option.battery_share(plan.device),
        }
        for option in options
    ]
    return {"plan": dataclasses.asdict(plan), "best": best, "rungs": entries}


def in_words(options: Sequence[TrainingOption], best: int | None, plan: PlanConfig) -> str:
    """Return a table of the options around the best one, and the composition of its memory.

    Args:
        options: the options from best to leanest.
        best: index of the best feasible option; None: none is feasible.
        plan: the configuration of the search.
    """
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
    table.add_column("limited by", no_wrap=True)
    for index in displayed(len(options), best, plan.alternatives):
        option, setting = options[index], options[index].setting
        costs = [""] * 4
        if option.seconds:
            hours, joules = option.steps * option.seconds / HOUR, option.steps * option.joules
            costs = [f"{option.seconds:.1f}", str(option.steps), f"{hours:.1f}", f"{joules / HOUR:.1f}"]
        bound = "" if option.footprint.activations_bytes else "≥ "  # no pass was run
        size = f"{bound}{option.footprint.peak_bytes / MIB:,.0f}"
        style = "bold" if index == best else "dim" if option.blocked else ""
        table.add_row(
            "▸" if index == best else "",
            f"{setting.resolution}²",
            setting.sites,
            setting.weights,
            setting.checkpointing,
            size,
            *costs,
            option.blocked or "",
            style=style,
        )
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with console.capture() as captured:
        console.print(Group(table, "", *_footer(options, best, plan)), highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def displayed(count: int, best: int | None, around: int) -> range:
    """Return the range of displayed options: the best and those around it; if none is feasible, the leanest.

    Args:
        count: number of options.
        best: index of the best; None: none is feasible.
        around: number of options on each side.
    """
    if best is None:
        return range(max(0, count - around), count)
    return range(max(0, best - around), min(count, best + around + 1))


def _footer(options: Sequence[TrainingOption], best: int | None, plan: PlanConfig) -> list[str]:
    """Return the lines below the table: the composition of the best plan's memory, and its energy beyond idling.

    Args:
        options: the options from best to leanest.
        best: index of the best feasible option; None: none is feasible.
        plan: the configuration of the search.
    """
    if best is None:
        return ["Nothing fits: use a smaller base or another device."]
    option, device = options[best], plan.device
    parts = [
        f"{name.removesuffix('_bytes')} {value / MIB:.0f}"
        for name, value in vars(option.footprint).items()
        if name.endswith("_bytes") and name != "moved_bytes" and value
    ]
    extra = option.steps * option.seconds * (device.watts_busy - device.watts_idle) / HOUR
    share = option.battery_share(device)
    energy = f"{extra:.1f} of its Wh are in addition to idle power"
    lines = [
        f"MiB of ▸: {', '.join(parts)}.",
        f"{energy}." if share is None else f"{energy}; in total they are {share:.0%} of a full battery.",
    ]
    if option.setting.batch > 1:
        lines.append(f"A step processes {option.setting.batch} pictures at a time.")
    if option.setting.weights != "fp32":
        lines.append("A quantized base is packed once (anther pack), and mapped from its file while it is used.")
    return [*lines, "These are predictions from the device's profile; nothing was run."]


if __name__ == "__main__":
    sys.exit(main())
