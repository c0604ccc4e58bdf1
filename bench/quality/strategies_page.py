"""docs/strategies.md, from what the benchmarks have written: python -m bench.quality.strategies page"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from bench.lib import plots
from bench.quality.federation import interval
from bench.quality.fleets import median_ratio

RESULTS = Path(__file__).parents[1] / "results"
DOCS = Path(__file__).parents[2] / "docs"

HEAD = """\
# Which strategy does what

Made by `python -m bench.quality.strategies page` from `bench/results`; every number below has its command there. All runs are
whole federations on the typefaces base, on writers that nothing was tuned on. Learning rates, grids and settings were
chosen on development writers, and the fleets and seeds were fixed before that.
"""


def write() -> None:
    """The page, and its plots beside it."""
    parts = [HEAD]
    if found := read("aggregators"):
        settings, cells = _cells(found)
        shared = {key: gain for key, gain in cells.items() if key[0] != "fedsa"}
        (DOCS / "aggregators.svg").write_text(plots.dots(settings, shared), encoding="utf-8")
        parts += ["\n".join(aggregators(found))]
    if found := read("fleets"):
        (DOCS / "fleets.svg").write_text(plots.scatter(_took(found), x="hours", y="kWh"), encoding="utf-8")
        parts += ["\n".join(fleets(found))]
    if found := read("robustness"):
        parts += ["\n".join(robustness(found))]
    (DOCS / "strategies.md").write_text("\n".join(parts), encoding="utf-8")


def read(name: str) -> Any:
    """What a benchmark has found; None if it has not been run."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else None


def aggregators(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Gains by rule and setting."""
    settings, cells = _cells(found)
    yield "## Aggregation × heterogeneity\n"
    yield (
        "Gain of the shared adapter: what it takes off the base's loss on held-out letters, in %; the best of a column "
        "in bold. Intervals, over writers, are in the plot. *ranks*: a quarter of the devices each train rank 2, 4, 8 "
        "and 16. *half the sites*: every second device trains half of the sites. Three seeds where both are so, else "
        "one. Of `fedsa`, whose B stays on each device, it is the gain of the two factors together there: it is "
        "personal, and is marked with a star. Learning rates are each rule's best of four with equal ranks; with "
        "privacy they are ten times that, which nobody tuned.\n"
    )
    yield "![Gains with 95 % intervals](aggregators.svg)\n"
    yield "| rule | " + " | ".join(settings) + " |"
    yield "|---|" + "---:|" * len(settings)
    best = {name: _best(cells, name) for name in settings}
    for rule in dict.fromkeys(rule for rule, _ in cells):
        row = []
        for name in settings:
            gain = cells.get((rule, name))
            text = "" if gain is None else f"{100 * gain[0]:.2f}{'*' if rule == 'fedsa' else ''}"
            row.append(f"**{text}**" if rule == best[name] else text)
        yield f"| {rule} | " + " | ".join(row) + " |"
    yield ""
    yield "How far a rule is ahead of `exact`, the default, where ranks differ: points of gain, [95 % over writers].\n"
    mixed = [name for name in settings if name.startswith("ranks")]
    yield "| rule | " + " | ".join(mixed) + " |"
    yield "|---|" + "---:|" * len(mixed)
    for rule in dict.fromkeys(each["rule"] for each in found if each["setting"] in mixed and each["rule"] != "exact"):
        ahead = [_ahead(found, rule, name) for name in mixed]
        yield f"| {rule} | " + " | ".join("" if each is None else _interval(each) for each in ahead) + " |"
    yield ""


def _ahead(found: Sequence[Mapping[str, Any]], rule: str, setting: str) -> tuple[float, float, float] | None:
    """Mean over the same writers and seeds of a rule's gain less that of exact, over the base's mean loss."""
    runs = {each["rule"]: each["runs"] for each in found if each["setting"] == setting}
    if rule not in runs:
        return None
    mine, other, base = (
        np.concatenate([run["losses"][arm] for run in runs[which]])
        for which, arm in ((rule, "shared"), ("exact", "shared"), ("exact", "base"))
    )
    low, high = interval(other - mine)
    mean = float(base.mean())
    return float((other - mine).mean()) / mean, low / mean, high / mean


def _interval(values: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def fleets(found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Iterator[str]:
    """What each arm took of its fleet."""
    yield "## Fleets that live\n"
    yield (
        "Until the first round with 80 % of the gain that the same writers reach where all of them train in every "
        "round: medians over three seeds of simulated hours and kWh, where all of them got there. Ratios are to "
        "the first row's run of the same seed, medians too. `fleet=week`: phones, boards and laptops with "
        "batteries, owners and heat. `fleet=spread`: boards and laptops that are always there, the fastest ten "
        "times as fast as the slowest. *Lost*: devices that never replied, in all runs until then. Gini: of how "
        "often each device took part. Small circles are runs, large ones their medians.\n"
    )
    yield "![Hours and kWh of each arm](fleets.svg)\n"
    for fleet, arms in found.items():
        yield f"### fleet={fleet}\n"
        yield "| arm | reached | rounds | hours | × | kWh | × | from batteries | lost | Gini |"
        yield "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|"
        first = next(iter(arms.values()))
        for name, runs in arms.items():
            lost = sum((Counter(run["lost"]) for run in runs), Counter())
            cells = [
                f"{sum(run['hours'] is not None for run in runs)} of {len(runs)}",
                _told(runs, "round", ".0f"),
                _told(runs, "hours", ".1f"),
                _ratio(runs, first, "hours"),
                _told(runs, "kwh", ".2f"),
                _ratio(runs, first, "kwh"),
                _told(runs, "battery_kwh", ".2f"),
                ", ".join(f"{count} {reason}" for reason, count in sorted(lost.items())) or "none",
                f"{median(run['gini'] for run in runs):.2f}",
            ]
            yield f"| {name} | " + " | ".join(cells) + " |"
        yield ""


def robustness(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is kept of the gain under each attack."""
    yield "## Robustness × attack\n"
    yield (
        "A fifth of the devices attack. Share of the clean gain that honest writers keep, and of the trigger's samples "
        "that are read as the attackers' glyph; without rules, and with one setting against all of them: "
        "`strategy.robust=[replay,foolsgold,afa,norm]`. Means over seeds, and the worst of them. Three other settings "
        "were measured on these writers too, and kept less: without `replay` 83 % under replays and the same under all "
        "else; without it and with `krum` in place of `afa` 71 % under flipped signs and 79 % under replays, and with "
        "whoever points against the others left out as well 82 % and 81 %.\n"
    )
    yield "| attack | kept, no rule | kept | backdoor, no rule | backdoor |"
    yield "|---|---:|---:|---:|---:|"
    for attack in dict.fromkeys(each["attack"] for each in found):
        cells = []
        for key in ("kept", "backdoor"):
            for protected in (False, True):
                of = [each[key] for each in found if (each["attack"], each["protected"]) == (attack, protected)]
                worst = max(of) if key == "backdoor" else min(of)
                cells.append(f"{fmean(of):.0%} [{worst:.0%}]")
        yield f"| {attack} | " + " | ".join(cells) + " |"
    yield ""


def _took(
    found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
) -> dict[str, dict[str, list[plots.Point | None]]]:
    """Hours and kWh of each run; None of one that never got there."""
    return {
        f"fleet={fleet}": {
            arm: [None if run["hours"] is None else (run["hours"], run["kwh"]) for run in runs]
            for arm, runs in arms.items()
        }
        for fleet, arms in found.items()
    }


def _cells(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[tuple[str, str], Sequence[float]]]:
    settings = list(dict.fromkeys(each["setting"] for each in found))
    return settings, {(each["rule"], each["setting"]): each["gain"] for each in found}


def _best(cells: Mapping[tuple[str, str], Sequence[float]], setting: str) -> str:
    """The rule of the highest gain among those that share the whole adapter."""
    here = {rule: gain[0] for (rule, name), gain in cells.items() if name == setting and rule != "fedsa"}
    return max(here, key=lambda rule: here[rule])


def _told(runs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    found = _middle(runs, key)
    return "—" if found is None else f"{found:{form}}"


def _ratio(runs: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], key: str) -> str:
    found = median_ratio([run[key] for run in runs], [run[key] for run in first])
    return "—" if found is None else f"{found:.2f}"


def _middle(runs: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Median over runs; None if one never got there."""
    values = [run[key] for run in runs]
    return None if None in values else median(values)
