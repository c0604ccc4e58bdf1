"""The report of a run, `report.html`: one page without other files, scripts or network access."""

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

from privacy.accounting import STRICT_DELTA
from server.report import formatting
from server.report.charts import LineSeries, ValueFormat, line_chart
from server.report.pictures import Thumbnail, png
from server.report.snippet import LoadingSnippet

ARMS = {
    "real": ("real", "the writer's own letters, held out from training"),
    "base": ("base", "the frozen base, which never saw this writer"),
    "local": ("local", "local training on the same device, with the same total steps and trained rank"),
    "shared": ("shared", "the federated adapter, the same for all devices"),
    "personal": ("shared + personal", "the shared adapter plus the device's own, which never left it"),
}
PHOTO_ARMS = {
    "real": ("real", "the pictures themselves, held out from training"),
    "base": ("base", "the frozen base, which never saw pictures of this device"),
}
Picture = np.ndarray | Thumbnail
HIGHLIGHTS = 4  # number of writers at the top of the page


@dataclass(frozen=True)
class DeviceRow:
    """One device: profile, cost of its training, and test loss of each arm."""

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
    """Number of rounds that used its update."""
    loss: dict[str, float]
    """Held-out test loss by arm: base, local, shared, personal."""


@dataclass(frozen=True)
class GalleryRow:
    """One writer's pictures: thumbnails, or uint8 [H, W] gray or [H, W, 3] color."""

    name: str
    kind: str
    """Kind of writer, e.g. `handwriting`; empty if unknown."""
    given: Sequence[Picture]
    """Training pictures on the page."""
    given_captions: list[str]
    captions: list[str]
    """Captions of the held-out pictures, one for each column of every arm."""
    arms: Mapping[str, Sequence[Picture]]
    """Held-out pictures by arm, in the order real, base, local, shared, personal; an arm may be missing."""
    training_count: int | None = None
    """Number of training pictures; None: all of them are on the page."""

    @property
    def count(self) -> int:
        """Number of training pictures."""
        return len(self.given) if self.training_count is None else self.training_count


@dataclass(frozen=True)
class Report:
    """Contents of the page."""

    title: str
    command: str
    config_yaml: str
    summary: dict[str, Any]
    """As in `summary.json`; legibility and style may be missing, or None for an arm."""
    rounds: list[dict[str, Any]]
    """One entry per round: round, base and shared (mean validation losses, or None), gain and gain_error (noised, or
    None), bytes_up, bytes_down and joules (of this round, over all devices), seconds (of the slowest device), epsilon
    and device_epsilon (so far, per image and per device, or None), dropped (replies by reason). For a fleet with its
    own clock also hours (at the end of the round) and lost (devices by reason)."""
    devices: list[DeviceRow]
    gallery: list[GalleryRow] = field(default_factory=list)
    use: LoadingSnippet | None = None
    """Code for loading the adapters into diffusers; None: omitted."""
    strategy: str = ""
    """Name of the aggregation."""
    letters: bool = True
    """Whether the pictures are letters of writers."""
    quality: str = "estimate"
    """Source of the devices' seconds and joules: `estimate` (from their profiles), or a description."""
    rates: str = "from the profile of the device"
    """Source of estimated seconds and joules."""
    test: bool = True
    """Whether the noise is reproducible, so that nothing is a release."""
    footer: str = ""
    """Identification of the run."""
    hidden: str = ""
    """Why single devices and rounds are omitted; empty: they are on the page."""


@dataclass(frozen=True)
class Chart:
    """A titled chart of the page."""

    title: str
    note: str
    svg: Markup


def render(report: Report) -> str:
    """Render the page as HTML."""
    losses = report.summary["loss"]
    return (
        environment()
        .get_template("template.html")
        .render(
            report=report,
            summary=report.summary,
            strict_delta=STRICT_DELTA,
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
    """Return the adapter file of the page's code example."""
    own = [device.name for device in report.devices if "personal" in device.loss]
    return f"personal/{own[0]}.with_shared.safetensors" if own else "shared.safetensors"


def environment(*folders: Path) -> Environment:
    """Return the environment of page templates, in this folder and in further ones, with the filters for numbers."""
    templates = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        number=formatting.number,
        short=formatting.short,
        percent=formatting.percent,
        data=formatting.data,
        energy=formatting.energy,
        duration=formatting.duration,
        png=png,
    )
    return templates


def write(report: Report, path: Path) -> None:
    """Write the page; it appears under its name only when complete."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(render(report), encoding="utf-8")
    unfinished.replace(path)


def gain(losses: Mapping[str, float], arm: str) -> float | None:
    """Return the relative loss reduction of an arm over the base, (L_base - L_arm) / L_base; None if it is unknown."""
    if arm not in losses or not losses.get("base"):
        return None
    return (losses["base"] - losses[arm]) / losses["base"]


def highlights(gallery: Sequence[GalleryRow], devices: Sequence[DeviceRow]) -> list[GalleryRow]:
    """Return the writers with the largest gain of `personal`, in descending order."""
    gains = {device.name: gain(device.loss, "personal") or 0.0 for device in devices}
    return sorted(gallery, key=lambda row: -gains.get(row.name, 0.0))[:HIGHLIGHTS]


def charts(rounds: Sequence[Mapping[str, Any]], quality: str, best_round: int | None = None) -> list[Chart]:
    """Make the charts of a run; ε only if there is a guarantee.

    Args:
        rounds: entries of `Report.rounds`.
        quality: source of seconds and joules.
        best_round: number of the best round; None: not mentioned.
    """
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
    best = "" if best_round is None else f"; the adapter of round {best_round} is kept"
    elapsed = so_far("seconds")
    unit, length = ("s", 1) if elapsed[-1] < 300 else ("min", 60) if elapsed[-1] < 18000 else ("h", 3600)
    time = LineSeries("time", [seconds / length for seconds in elapsed], "ink")
    slowest = f"the slowest device of each round, {quality}"
    noised = [LineSeries("gain", [row["gain"] for row in rounds], "shared")]
    errors = [row["gain_error"] for row in rounds if row["gain_error"] is not None]
    figures = [
        chart("Validation loss", f"trimmed mean over devices{best}", loss, formatting.number, from_zero=False),
        chart(
            "Gain on validation, noised",
            f"reduction of the base's loss, ± {formatting.number(max(errors, default=None))} by its noise",
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
        hours = [LineSeries("time", [row["hours"] for row in rounds], "ink")]
        note = "on the fleet's clock, at the end of each round"
        figures[3] = chart("Simulated time", note, hours, lambda value: f"{formatting.short(value)} h")
    spent = [
        LineSeries(f"per {unit}", [row.get(key) for row in rounds], tone)
        for key, unit, tone in (("epsilon", "image", "personal"), ("device_epsilon", "device", "shared"))
        if any(row.get(key) is not None for row in rounds)
    ]
    if spent:
        figures.insert(2, chart("ε so far", "the largest of any device", spent, formatting.short))
    return [figure for figure in figures if figure.svg]  # without measurements, or all hidden in noise


def span(counts: Sequence[int]) -> str:
    """Format a range of counts: `5`, or `3 to 8`; empty for no counts."""
    low, high = min(counts, default=0), max(counts, default=0)
    if high == 0:
        return ""
    return str(high) if low == high else f"{low} to {high}"


def label(caption: str) -> str:
    """Return the letter at the end of a caption; empty if there is none, since a column is narrow."""
    final = caption.rsplit(" ", 1)[-1]
    return final if len(final) == 1 else ""
