"""Terminal output of a simulation: a live line below the completed rounds, or plain lines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from privacy.accounting import STRICT_DELTA
from server.report.formatting import data, duration, number, percent, short
from simulations.report.time_left import RunWork

ARMS = {"base": "base", "local": "local", "shared": "shared", "personal": "shared + personal"}
TRAINING, PERSONALIZING = "training", "personalizing"  # phases
BAR = 12  # characters
FULL_BAR_GAIN = 0.3  # gain over the base that fills a bar
MIN_TABLE_WIDTH = 60  # columns that the complete results table needs
MIN_DEVICES, MIN_ROUNDS = 10, 4  # smaller runs are too small to compare arms


class Display:
    """Display with live output if the terminal can redraw a line, else with a plain line for each phase and round.

    Use it as a context manager: `phase` and `advance` while working, `round` after each round, then `finish`, or
    `interrupted`. No result of a run depends on it.

    Attributes:
        work: estimated work, for the time left; by default that of equal rounds, and none after them.
    """

    def __init__(
        self,
        rounds: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a display.

        Args:
            rounds: total number of rounds, including those before a resumption.
            console: console to print to; None: the terminal.
            clock: returns seconds, for the elapsed and the remaining time.
        """
        self._rounds, self.work = rounds, RunWork([1.0] * rounds)
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._started = clock()
        self._last_round: int | None = None
        self._round_ends: list[float] = []  # start of the first round, then the end of each round of this process
        self._phase = ""
        self._done = 0
        self._total: int | None = None
        redraws = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, get_renderable=self._status, transient=True) if redraws else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_live()

    def phase(self, name: str, total: int | None = None) -> None:
        """Start a phase, e.g. `encoding`, `training`, `personalizing`; `total`: its number of parts if known."""
        if name != self._phase and not self._live:
            self._print(Text(f"{self._elapsed():>5}  {name} …"))
        if name == TRAINING and not self._round_ends:
            self._round_ends.append(self._clock())
        self._phase, self._done, self._total = name, 0, total

    def say(self, words: str) -> None:
        """Print a line."""
        self._print(Text(words))

    def advance(self, parts: int = 1) -> None:
        """Count completed parts of the phase."""
        self._done += parts

    def round(self, record: Mapping[str, Any]) -> None:
        """Print a completed round, including rounds before a resumption.

        Args:
            record: `round`; `base` and `shared` (validation losses), or `gain` and `gain_error` if measured with noise.
                For a round of training also `replied` or `devices`, `dropped`, `refused` (part of the dropped),
                `bytes_up`, `bytes_down` and `guarantees` so far. For a timed fleet also `hours` on its clock and
                `lost`, the number of lost devices.
        """
        self._last_round = int(record["round"])
        if self._round_ends:
            now = self._clock()
            self._round_ends = [now] if self._last_round == 0 else [*self._round_ends, now]  # round 0 trains nothing
        self._print(self._line(record))

    def finish(self, summary: Mapping[str, Any], paths: Mapping[str, object]) -> None:
        """Print the results (contents of `summary.json`) and the output paths by name."""
        self._stop_live()
        self._print(Text())
        self._console.print(results_table(summary, self._console.width))
        for epsilon in filter(None, (summary.get("epsilon"), summary.get("device_epsilon"))):
            promise = f"ε = {short(epsilon['value'])} per {epsilon['unit']}, δ = {short(epsilon['delta'])}"
            if (strict := epsilon.get("strict")) is not None:
                promise += f" (ε = {short(strict)} at δ = {short(STRICT_DELTA)})"
            if (seen := epsilon.get("seen")) is not None:
                promise += f" (ε = {short(seen)} if the network sees who was asked)"
            self._print(Text(f"{promise}, {epsilon['relation'].replace('_', ' ')}; simulated noise, so not a release"))
        traffic = f"{data(summary['bytes']['up'])} up, {data(summary['bytes']['down'])} down"
        strategy = f" of {summary['strategy']}" if summary.get("strategy") else ""
        counts = f"{plural(summary['clients'], 'device')}, {plural(summary['rounds'], 'round')}{strategy}"
        self._print(Text(f"{counts}, {traffic}, {duration(summary['seconds'])}"))
        if fleet := summary.get("fleet"):
            lost = ", ".join(f"{count} {cause}" for cause, count in fleet["lost"].items()) or "none"
            energy = f"{short(fleet['kwh'])} kWh, {short(fleet['battery_kwh'])} of it from batteries"
            self._print(
                Text(
                    f"{short(fleet['hours'])} simulated hours, {energy}; devices lost: {lost}; {fleet['late']} late; "
                    f"Gini of participation {fleet['gini']:.2f}"
                )
            )
        if joined := summary.get("newcomers"):
            losses = [f"{ARMS[arm]} {number(joined['loss'][arm])}" for arm in ARMS if arm in joined["loss"]]
            self._print(Text(f"{plural(joined['judged'], 'newcomer')}: {', '.join(losses)}"))
        if too_small(summary):
            size = f"{plural(summary['rounds'], 'round')} on {plural(evaluated_devices(summary), 'device')}"
            self._print(Text(f"{size}: too small to compare arms; a run to try out the whole path", style="yellow"))
        for name, path in paths.items():
            self._print(Text(f"{name}: ").append(str(path), style="bold"))

    def interrupted(self, resume_command: str | None) -> None:
        """Print how to continue an interrupted run.

        Args:
            resume_command: command that continues the run; None: the run had not started.
        """
        self._stop_live()
        if resume_command is None:
            self._print(Text("Stopped before anything was saved: there is nothing to continue."))
            return
        last = self._last_round
        where = "before the first round" if last is None else f"after round {last} of {self._rounds}"
        self._print(Text(f"Stopped {where}. To continue:"))
        self._print(Text(f"  {resume_command}", style="bold"))

    def _stop_live(self) -> None:
        if self._live:
            self._live.stop()

    def _print(self, line: Text) -> None:
        """Print one line without wrapping, so that paths and commands can be copied."""
        self._console.print(line, soft_wrap=True)

    def _line(self, record: Mapping[str, Any]) -> Text:
        relative_gain, noised = gain(record["base"], record["shared"]), record.get("gain")
        line = Text() if self._live else Text(f"{self._elapsed():>5}  ")
        line.append(f"round {record['round']:>{len(str(self._rounds))}} of {self._rounds}  ")
        if noised is None:
            line.append(f"loss {number(record['shared']):<7} ", style="bold" if self._live else "")
            if self._live:
                line.append(bar(relative_gain / FULL_BAR_GAIN), style="yellow").append(" ")
            line.append(f"{relative_to_base(relative_gain):<22}")
        else:
            line.append(f"gain {number(noised)}", style="bold" if self._live else "")
            line.append(f" ± {number(record['gain_error'])} by its noise")
        if "bytes_up" in record:
            refused = f", {record['refused']} of them refusals" if record.get("refused") else ""
            dropped = f" ({record['dropped']} dropped{refused})" if record.get("dropped") else ""
            line.append(f"  {record.get('replied', record.get('devices'))} devices{dropped}", style="dim")
            if "hours" in record:
                lost = f", {record['lost']} lost" if record["lost"] else ""
                line.append(f"  {record['hours']:.1f} h{lost}", style="dim")
            line.append(f"  {data(record['bytes_up'])} up, {data(record['bytes_down'])} down", style="dim")
            for guarantee in record.get("guarantees", ()):
                line.append(f"  {guarantee}", style="magenta")
        if not self._live and (remaining := self._seconds_left()) is not None:
            line.append(f"  about {duration(remaining)} left")
        line.rstrip()
        if self._live:
            line.truncate(self._console.width, overflow="ellipsis")
        return line

    def _status(self) -> Text:
        """Return the live line, redrawn several times a second."""
        status = Text(f"{self._elapsed():>5}  ", no_wrap=True, overflow="ellipsis")
        if self._phase == TRAINING:
            status.append(f"round {min((self._last_round or 0) + 1, self._rounds)} of {self._rounds}  ", style="bold")
        status.append(self._phase)
        if self._total:
            status.append(f" {bar(self._done / self._total)} {self._done}/{self._total}", style="cyan")
        else:
            status.append(" …")
        if self._phase == TRAINING and (remaining := self._seconds_left()) is not None:
            status.append(f"  about {duration(remaining)} left", style="dim")
        return status

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(self._clock() - self._started), 60)
        return f"{minutes}:{seconds:02}"

    def _seconds_left(self) -> float | None:
        """Estimate the seconds to the end from the rounds of this process; None after the last part."""
        if len(self._round_ends) < 2 or self._last_round is None:
            return None
        left = self.work.seconds_left(self._last_round, [end - start for start, end in pairwise(self._round_ends)])
        return max(0.0, left - (self._clock() - self._round_ends[-1])) if left > 0 else None


def too_small(summary: Mapping[str, Any]) -> bool:
    """Return whether a run is so small that chance decides which arm is best."""
    return evaluated_devices(summary) < MIN_DEVICES or summary["rounds"] < MIN_ROUNDS


def evaluated_devices(summary: Mapping[str, Any]) -> int:
    """Return the number of devices on which the arms were compared."""
    return int(summary.get("judged", summary["clients"]))


def compare(runs: Sequence[tuple[Sequence[str], Mapping[str, Any]]], console: Console | None = None) -> None:
    """Print a table of several runs, each named by the settings in which it differs from the others.

    Args:
        runs: overrides and summary of each run.
        console: console to print to; None: the terminal.
    """
    common = set.intersection(*(set(overrides) for overrides, _ in runs))
    arms = [arm for arm in ARMS if any(arm in summary["loss"] for _, summary in runs)]
    table = Table(box=None, padding=(0, 2, 0, 0), title="loss on unseen pictures", title_justify="left")
    for name in ("run", *(ARMS[arm] for arm in arms), "up", "ε"):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=name != "run")
    for index, (overrides, summary) in enumerate(runs):
        name = " ".join(word for word in overrides if word not in common) or "as given"
        losses = [number(summary["loss"].get(arm)) for arm in arms]
        guarantee = summary.get("epsilon") or summary.get("device_epsilon")
        epsilon = short(guarantee["value"]) if guarantee else ""
        table.add_row(f"{index}: {name}", *losses, data(summary["bytes"]["up"]), epsilon)
    console = console or Console(highlight=False)
    console.print()
    console.print(table)


def gain(base: float | None, arm: float | None) -> float:
    """Return the relative decrease of the base's loss; NaN if a loss was not measured."""
    return (base - arm) / base if base and arm is not None else math.nan


def relative_to_base(gain: float) -> str:
    """Format a gain, e.g. `12 % below the base`."""
    if math.isnan(gain):
        return "not measured"
    if abs(gain) < 5e-4:
        return "as the base"
    return f"{percent(abs(gain))} {'below' if gain > 0 else 'above'} the base"


def bar(fraction: float, width: int = BAR) -> str:
    """Draw a bar filled to this fraction, in eighths of a character."""
    filled = 0.0 if math.isnan(fraction) else min(max(fraction, 0.0), 1.0)
    full, part = divmod(round(filled * width * 8), 8)
    return ("█" * full + " ▏▎▍▌▋▊▉"[part] * (part > 0)).ljust(width, "░")


def plural(count: int, noun: str) -> str:
    """Format a count, e.g. `1 round`, `2 rounds`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def results_table(summary: Mapping[str, Any], width: int) -> Table:
    """Build the table of results on held-out pictures; on a narrow terminal with loss and gain only."""
    losses = summary["loss"]
    scores = {name: summary.get(name) or {} for name in ("legibility", "style")}
    measures = [name for name, by_arm in scores.items() if width >= MIN_TABLE_WIDTH and set(by_arm.values()) - {None}]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("unseen pictures", no_wrap=True)
    for name in ("loss", "gain", *measures):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, words in ARMS.items():
        if arm in losses:
            cells = [number(losses[arm]), "" if arm == "base" else percent(gain(losses["base"], losses[arm]))]
            cells += [percent(scores[name].get(arm)) for name in measures]
            table.add_row(words, *cells, style="bold" if arm == "personal" else None)
    return table
