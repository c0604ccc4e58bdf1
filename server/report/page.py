"""`report.html`: what a run did, in one page that needs no other file, no script and no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from privacy.accounting import STRICT
from server.report import formatting
from server.report.charts import LineSeries, ValueFormat, line_chart
from server.report.pictures import Thumbnail, png
from server.report.snippet import LoadingSnippet

ARMS = {
    "real": ("real", "letters of the writer's own; no device trained on these"),
    "base": ("base", "the frozen base, which never saw this writer"),
    "local": ("local", "the same device without the others, with the same total steps and trained rank"),
    "shared": ("shared", "the adapter that the federation made, the same for everyone"),
    "personal": ("shared + personal", "the shared adapter under the one that never left the device"),
}
PHOTO_ARMS = {
    "real": ("real", "the pictures themselves; no device trained on these"),
    "base": ("base", "the frozen base, which never saw pictures of this device"),
}
Picture = np.ndarray | Thumbnail
HIGHLIGHTS = 4  # writers shown in the first screens


@dataclass(frozen=True)
class DeviceRow:
    """One device: what it is, what its training cost, and how well each arm does on its test pictures."""

    name: str
    profile: str
    rank: int
    steps: int
    seconds: float
    joules: float
    bytes_up: int
    bytes_down: int
    epsilon: float | None
    rounds: int
    """In how many its update was used."""
    loss: dict[str, float]
    """Held-out test loss by arm: base, local, shared, personal."""


@dataclass(frozen=True)
class GalleryRow:
    """One writer's pictures: thumbnails, or uint8 [H, W] gray or [H, W, 3] color."""

    name: str
    kind: str
    """What the writer is, e.g. `handwriting`; empty if there is nothing to say."""
    given: Sequence[Picture]
    """Those that are shown of what was trained on."""
    given_captions: list[str]
    captions: list[str]
    """Of the held-out pictures, one for each column of every arm."""
    arms: Mapping[str, Sequence[Picture]]
    """By arm, in the order real, base, local, shared, personal; an arm may be missing."""
    gave: int | None = None
    """How many were trained on; None: as many as are shown."""

    @property
    def count(self) -> int:
        """How many pictures were trained on."""
        return len(self.given) if self.gave is None else self.gave


@dataclass(frozen=True)
class Report:
    """All that the page says."""

    title: str
    command: str
    config_yaml: str
    summary: dict[str, Any]
    """As in `summary.json`; legibility and style may be missing, or None for an arm."""
    rounds: list[dict[str, Any]]
    """One of each round: round, base and shared (mean validation losses, or None), gain and gain_error (of a noised
    one, or None), bytes_up, bytes_down and joules (of this round, over all devices), seconds (of its slowest), epsilon
    and device_epsilon (so far, per image and per device, or None), dropped (replies by reason); and of a fleet with a
    clock of its own hours (on it when the round was over) and lost (devices by what became of them)."""
    devices: list[DeviceRow]
    gallery: list[GalleryRow] = field(default_factory=list)
    use: LoadingSnippet | None = None
    """How its adapters are loaded into diffusers; None: not shown."""
    strategy: str = ""
    """How updates were aggregated, in a word or two."""
    letters: bool = True
    """Whether the pictures are letters that people write."""
    quality: str = "estimate"
    """How the devices' seconds and joules were had: `estimate` from their profiles, or else in words."""
    rates: str = "from the profile of the device"
    """Where estimated seconds and joules come from."""
    test: bool = True
    """Noise can be made again, so that nothing is a release."""
    footer: str = ""
    """What tells this run from others."""
    hidden: str = ""
    """Why nothing is told of single devices and rounds, where it isn't."""


@dataclass(frozen=True)
class Chart:
    """A titled chart of the page."""

    title: str
    note: str
    svg: Markup


def render(report: Report) -> str:
    """The whole page as HTML."""
    losses = report.summary["loss"]
    return (
        environment()
        .get_template("template.html")
        .render(
            report=report,
            summary=report.summary,
            strict_delta=STRICT,
            arms=ARMS | ({} if report.letters else PHOTO_ARMS),
            results=[arm for arm in ARMS if arm in losses],
            gains={arm: gain(losses, arm) for arm in losses},
            best=max((value for arm in losses if (value := gain(losses, arm)) is not None), default=0.0),
            device_gains=[gain(device.loss, "personal") for device in report.devices],
            judged=[
                name for name in ("legibility", "style") if set((report.summary.get(name) or {}).values()) - {None}
            ],
            highlights=highlights(report.gallery, report.devices),
            charts=charts(report.rounds, report.quality, report.summary.get("best_round")),
            given=span([row.count for row in report.gallery]),
            label=label,
            dropped=sum((Counter(row["dropped"]) for row in report.rounds), Counter[str]()),
            adapter=adapter(report),
            example=next((caption for row in report.gallery for caption in row.captions), "a picture"),
        )
    )


def adapter(report: Report) -> str:
    """The file that the page shows how to use."""
    own = [device.name for device in report.devices if "personal" in device.loss]
    return f"personal/{own[0]}.with_shared.safetensors" if own else "shared.safetensors"


def environment(*folders: Path) -> Environment:
    """Where templates of pages are found, here and in further folders, with the words that they use."""
    found = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        number=formatting.number,
        short=formatting.short,
        percent=formatting.percent,
        data=formatting.data,
        energy=formatting.energy,
        duration=formatting.duration,
        png=png,
    )
    return found


def write(report: Report, path: Path) -> None:
    """Write the page; it appears under its name only when complete."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(render(report), encoding="utf-8")
    unfinished.replace(path)


def gain(losses: Mapping[str, float], arm: str) -> float | None:
    """(L_base - L_arm) / L_base: by how much of itself the base's loss falls."""
    if arm not in losses or not losses.get("base"):
        return None
    return (losses["base"] - losses[arm]) / losses["base"]


def highlights(gallery: Sequence[GalleryRow], devices: Sequence[DeviceRow]) -> list[GalleryRow]:
    """Those whose loss fell most from base to personal, most first."""
    gains = {device.name: gain(device.loss, "personal") or 0.0 for device in devices}
    return sorted(gallery, key=lambda row: -gains.get(row.name, 0.0))[:HIGHLIGHTS]


def charts(rounds: Sequence[Mapping[str, Any]], quality: str, best_round: int | None = None) -> list[Chart]:
    """The curves of a run; ε only where there was a promise."""
    if not rounds:
        return []
    x = [int(row["round"]) for row in rounds]

    def chart(title: str, note: str, lines: list[LineSeries], show: ValueFormat, *, from_zero: bool = True) -> Chart:
        return Chart(title, note, line_chart(x, lines, show, from_zero=from_zero, x_label="round"))

    def so_far(key: str) -> list[float]:
        return list(accumulate(float(row[key]) for row in rounds))

    loss = [
        LineSeries("base", [row["base"] for row in rounds], "base", dashed=True),
        LineSeries("shared", [row["shared"] for row in rounds], "shared"),
    ]
    traffic = [LineSeries("up", so_far("bytes_up"), "shared"), LineSeries("down", so_far("bytes_down"), "local")]
    chosen = "" if best_round is None else f"; the adapter of round {best_round} is the one that stays"
    elapsed = so_far("seconds")
    unit, length = ("s", 1) if elapsed[-1] < 300 else ("min", 60) if elapsed[-1] < 18000 else ("h", 3600)
    time = LineSeries("time", [seconds / length for seconds in elapsed], "ink")
    slowest = f"the slowest device of each round, {quality}"
    noised = [LineSeries("gain", [row["gain"] for row in rounds], "shared")]
    errors = [row["gain_error"] for row in rounds if row["gain_error"] is not None]
    drawn = [
        chart("Validation loss", f"trimmed mean over devices{chosen}", loss, formatting.number, from_zero=False),
        chart(
            "Gain on validation, noised",
            f"what the adapter takes off the base's loss, ± {formatting.number(max(errors, default=None))} by its noise",
            noised,
            formatting.number,
        ),
        chart("Bytes so far", "adapters of the training rounds, all devices", traffic, formatting.data),
        chart(
            "Device time so far",
            slowest,
            [time],
            lambda value: f"{formatting.short(value)} {unit}",
        ),
        chart(
            "Energy so far",
            f"all devices, {quality}",
            [LineSeries("energy", so_far("joules"), "ink")],
            formatting.energy,
        ),
    ]
    if rounds[-1].get("hours") is not None:
        ended = [LineSeries("time", [row["hours"] for row in rounds], "ink")]
        note = "on the fleet's clock, when a round was over"
        drawn[3] = chart("Simulated time", note, ended, lambda value: f"{formatting.short(value)} h")
    spent = [
        LineSeries(f"per {unit}", [row.get(key) for row in rounds], tone)
        for key, unit, tone in (("epsilon", "image", "personal"), ("device_epsilon", "device", "shared"))
        if any(row.get(key) is not None for row in rounds)
    ]
    if spent:
        drawn.insert(2, chart("ε so far", "the largest of any device", spent, formatting.short))
    return [one for one in drawn if one.svg]  # nobody measured, or all are hidden in noise


def span(counts: Sequence[int]) -> str:
    """`5`, or `3 to 8`; empty for none."""
    low, high = min(counts, default=0), max(counts, default=0)
    if high == 0:
        return ""
    return str(high) if low == high else f"{low} to {high}"


def label(caption: str) -> str:
    """The letter that a caption ends with, where it names one; else nothing, for a column has little room."""
    final = caption.rsplit(" ", 1)[-1]
    return final if len(final) == 1 else ""
