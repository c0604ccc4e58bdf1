"""What a person sees at the terminal while a simulation runs: a live line below the rounds, or plain lines."""

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

from privacy.accounting import STRICT
from server.report.formatting import data, duration, number, percent, short

ARMS = {"base": "base", "local": "alone", "shared": "shared", "personal": "shared + personal"}
BAR = 12  # characters
FULL = 0.3  # gain over the base that fills a bar
NARROW = 60  # columns that the whole table of results takes
JUDGED, ROUNDS = 10, 4  # devices and rounds under which a run says too little of its arms


class Display:
    """Live where the terminal can redraw a line, else one plain line for each phase and round.

    Use as a context manager: `phase` and `advance` while working, `round` after each round, then `finish`, or
    `stopped` when interrupted. It only shows: nothing that a run computes depends on it.
    """

    def __init__(
        self,
        rounds: int,
        *,
        after: float = 0.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        rounds: how many there will be in all, those before a resumption among them.
        after: work that follows them, in rounds.
        """
        self._rounds, self._after = rounds, after
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._started = clock()
        self._last_round: int | None = None
        self._ends: list[float] = []  # when the rounds began, and when each one that this process saw was over
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
        self._settle()

    def phase(self, name: str, total: int | None = None) -> None:
        """What goes on now, e.g. `encoding`, `training`, `personalising`, `drawing`; of `total` parts if known."""
        if name != self._phase and not self._live:
            self._print(Text(f"{self._elapsed():>5}  {name} …"))
        if name == "training" and not self._ends:
            self._ends.append(self._clock())
        self._phase, self._done, self._total = name, 0, total

    def say(self, words: str) -> None:
        """A line that stays."""
        self._print(Text(words))

    def advance(self, parts: int = 1) -> None:
        """So many parts of the phase are done."""
        self._done += parts

    def round(self, record: Mapping[str, Any]) -> None:
        """A round is over, or was before a resumption.

        Args:
            record: `round`, `base` and `shared` (validation losses) or `gain` and `gain_error` (of a noised one), and
                of a round in which devices trained `replied` or `devices`, `dropped` and how many of them `refused`,
                `bytes_up`, `bytes_down` and `guarantees` (so far); of a fleet with a clock of its own the `hours` on
                it, and how many devices were `lost`.
        """
        self._last_round = int(record["round"])
        if self._ends:
            now = self._clock()
            self._ends = [now] if self._last_round == 0 else [*self._ends, now]  # before round 1 nothing is trained
        self._print(self._line(record))

    def finish(self, summary: Mapping[str, Any], paths: Mapping[str, object]) -> None:
        """The result, as in `summary.json`, and where things lie: what was written, and its path."""
        self._settle()
        self._print(Text())
        self._console.print(results(summary, self._console.width))
        for epsilon in filter(None, (summary.get("epsilon"), summary.get("device_epsilon"))):
            promise = f"ε = {short(epsilon['value'])} per {epsilon['unit']}, δ = {short(epsilon['delta'])}"
            if (strict := epsilon.get("strict")) is not None:
                promise += f" (ε = {short(strict)} at δ = {short(STRICT)})"
            if (seen := epsilon.get("seen")) is not None:
                promise += f" (ε = {short(seen)} if the network sees who was asked)"
            self._print(Text(f"{promise}, {epsilon['relation'].replace('_', ' ')}; simulated noise, so not a release"))
        traffic = f"{data(summary['bytes']['up'])} up, {data(summary['bytes']['down'])} down"
        strategy = f" of {summary['strategy']}" if summary.get("strategy") else ""
        counts = f"{plural(summary['clients'], 'device')}, {plural(summary['rounds'], 'round')}{strategy}"
        self._print(Text(f"{counts}, {traffic}, {duration(summary['seconds'])}"))
        if fleet := summary.get("fleet"):
            lost = ", ".join(f"{count} {reason}" for reason, count in fleet["lost"].items()) or "none"
            energy = f"{short(fleet['kwh'])} kWh, {short(fleet['battery_kwh'])} of it from batteries"
            self._print(
                Text(
                    f"{short(fleet['hours'])} simulated hours, {energy}; devices lost: {lost}; {fleet['late']} late; "
                    f"Gini of who took part {fleet['gini']:.2f}"
                )
            )
        if too_little(summary):
            tried = f"{plural(summary['rounds'], 'round')} on {plural(judged(summary), 'device')}"
            self._print(Text(f"{tried}: too little to judge an arm by; it shows the whole path once", style="yellow"))
        for name, path in paths.items():
            self._print(Text(f"{name}: ").append(str(path), style="bold"))

    def stopped(self, resume_command: str | None) -> None:
        """The run was interrupted.

        Args:
            resume_command: how to go on; None: nothing was begun that could be.
        """
        self._settle()
        if resume_command is None:
            self._print(Text("Stopped before anything was kept: there is nothing to continue."))
            return
        last = self._last_round
        where = "before the first round" if last is None else f"after round {last} of {self._rounds}"
        self._print(Text(f"Stopped {where}. To continue:"))
        self._print(Text(f"  {resume_command}", style="bold"))

    def _settle(self) -> None:
        if self._live:
            self._live.stop()

    def _print(self, line: Text) -> None:
        """One line, never wrapped: paths and commands are there to be copied."""
        self._console.print(line, soft_wrap=True)

    def _line(self, record: Mapping[str, Any]) -> Text:
        fall, noised = gain(record["base"], record["shared"]), record.get("gain")
        line = Text() if self._live else Text(f"{self._elapsed():>5}  ")
        line.append(f"round {record['round']:>{len(str(self._rounds))}} of {self._rounds}  ")
        if noised is None:
            line.append(f"loss {number(record['shared']):<7} ", style="bold" if self._live else "")
            if self._live:
                line.append(bar(fall / FULL), style="yellow").append(" ")
            line.append(f"{relative_to_base(fall):<22}")
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
        if not self._live and (left := self._left()) is not None:
            line.append(f"  about {duration(left)} left")
        line.rstrip()
        if self._live:
            line.truncate(self._console.width, overflow="ellipsis")
        return line

    def _status(self) -> Text:
        """The live line, drawn anew several times a second."""
        status = Text(f"{self._elapsed():>5}  ", no_wrap=True, overflow="ellipsis")
        if self._phase == "training":
            status.append(f"round {min((self._last_round or 0) + 1, self._rounds)} of {self._rounds}  ", style="bold")
        status.append(self._phase)
        if self._total:
            status.append(f" {bar(self._done / self._total)} {self._done}/{self._total}", style="cyan")
        else:
            status.append(" …")
        if self._phase == "training" and (left := self._left()) is not None:
            status.append(f"  about {duration(left)} left", style="dim")
        return status

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(self._clock() - self._started), 60)
        return f"{minutes}:{seconds:02}"

    def _left(self) -> float | None:
        """Seconds until all is over, by the quickest round that this process has seen: the first has more to do."""
        if len(self._ends) < 2 or self._last_round is None:
            return None
        rounds = self._rounds - self._last_round + self._after
        each = min(end - start for start, end in pairwise(self._ends))
        return max(0.0, each * rounds - (self._clock() - self._ends[-1])) if rounds > 0 else None


def too_little(summary: Mapping[str, Any]) -> bool:
    """Whether a run is so small that which arm comes out ahead is chance."""
    return judged(summary) < JUDGED or summary["rounds"] < ROUNDS


def judged(summary: Mapping[str, Any]) -> int:
    """On how many devices the arms were compared."""
    return int(summary.get("judged", summary["clients"]))


def compare(runs: Sequence[tuple[Sequence[str], Mapping[str, Any]]], console: Console | None = None) -> None:
    """Print a table of several runs, each named by the settings in which it differs from the others.

    Args:
        runs: the overrides of each, and its summary.
        console: where; None: the terminal.
    """
    alike = set.intersection(*(set(overrides) for overrides, _ in runs))
    arms = [arm for arm in ARMS if any(arm in summary["loss"] for _, summary in runs)]
    table = Table(box=None, padding=(0, 2, 0, 0), title="loss on unseen pictures", title_justify="left")
    for name in ("run", *(ARMS[arm] for arm in arms), "up", "ε"):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=name != "run")
    for place, (overrides, summary) in enumerate(runs):
        name = " ".join(word for word in overrides if word not in alike) or "as given"
        losses = [number(summary["loss"].get(arm)) for arm in arms]
        promised = summary.get("epsilon") or summary.get("device_epsilon")
        spent = short(promised["value"]) if promised else ""
        table.add_row(f"{place}: {name}", *losses, data(summary["bytes"]["up"]), spent)
    console = console or Console(highlight=False)
    console.print()
    console.print(table)


def gain(base: float | None, arm: float | None) -> float:
    """By how much of itself the base's loss has fallen; NaN where somebody measured nothing."""
    return (base - arm) / base if base and arm is not None else math.nan


def relative_to_base(fall: float) -> str:
    """`12 % below the base`."""
    if math.isnan(fall):
        return "not measured"
    if abs(fall) < 5e-4:
        return "as the base"
    return f"{percent(abs(fall))} {'below' if fall > 0 else 'above'} the base"


def bar(share: float, width: int = BAR) -> str:
    """A bar of which `share` is filled, in eighths of a character."""
    filled = 0.0 if math.isnan(share) else min(max(share, 0.0), 1.0)
    full, part = divmod(round(filled * width * 8), 8)
    return ("█" * full + " ▏▎▍▌▋▊▉"[part] * (part > 0)).ljust(width, "░")


def plural(count: int, what: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def results(summary: Mapping[str, Any], width: int) -> Table:
    """What a run showed on pictures that nobody trained on; loss and gain alone where there is little room."""
    losses = summary["loss"]
    judged = {name: summary.get(name) or {} for name in ("legibility", "style")}
    measures = [name for name, by_arm in judged.items() if width >= NARROW and set(by_arm.values()) - {None}]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("unseen pictures", no_wrap=True)
    for name in ("loss", "gain", *measures):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, words in ARMS.items():
        if arm in losses:
            cells = [number(losses[arm]), "" if arm == "base" else percent(gain(losses["base"], losses[arm]))]
            cells += [percent(judged[name].get(arm)) for name in measures]
            table.add_row(words, *cells, style="bold" if arm == "personal" else None)
    return table
