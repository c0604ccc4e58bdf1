"""Tables of `anther bench people`, for the terminal and as rows of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

Results = Mapping[str, Any]
Row = list[str]


def number(value: Sequence[float | None] | float | None, form: str = ".2f") -> str:
    """Format an estimate as `value [low, high]`, or a number; a dash stands for a missing one."""
    if value is None:
        return "–"
    if isinstance(value, int | float):
        return format(value, form)
    shown, low, high = ("–" if part is None else format(part, form) for part in value)
    return f"{shown} [{low}, {high}]"


def percent(value: Sequence[float | None] | float | None) -> str:
    """Format an estimate in percent."""
    return number(value, ".0%")


def aims(rows: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Yield a row for each aim: text, bound, measured value and verdict."""
    yield ["aim", "bound", "measured [95 %]", ""]
    for row in rows:
        sign = "≤" if row["at_most"] else "≥"
        yield [row["aim"], f"{sign} {row['bound']:g}", number(row["measured"]), "met" if row["met"] else "**missed**"]


def arms(block: Results) -> Iterator[Row]:
    """Yield a row for each arm of a comparison of members with themselves."""
    yield ["trained", "loss", "gain of the base's loss", "gain relative to local"]
    yield ["base", number(block["base"], ".4f"), "", ""]
    ratios = {"personal": block["ratio"], "local": 1.0}
    for arm, values in block["arms"].items():
        gain = number(values["relative_gain"], ".1%")
        yield [arm, number(values["loss"], ".4f"), gain, number(ratios[arm]) if arm in ratios else ""]


def joined(block: Results, group: str) -> Iterator[Row]:
    """Yield a row for each group of people who joined after the rounds.

    Args:
        block: the results.
        group: heading of the groups.
    """
    yield [group, "people", "share of members' gain"]
    for name, values in block["groups"].items():
        yield [name, str(values["people"]), percent(values["share"])]
    yield ["all", str(block["people"]), percent(block["share"])]


def private(block: Results) -> Iterator[Row]:
    """Yield a row for each private run."""
    yield ["run", "ε", "δ", "unit", "rounds", "share of the open shared gain"]
    for form, values in block.items():
        spent = values["epsilon"] or {}
        epsilon = f"{spent['value']:.2f}" if spent else ""
        cells = [epsilon, f"{spent['delta']:g}" if spent else "", str(spent.get("unit", ""))]
        yield [form, *cells, str(values["rounds"]), percent(values["share"])]


def pictures(block: Results) -> Iterator[Row]:
    """Yield a row for each judge and arm."""
    yield ["judge", "letters", "read as their caption", "match of the person's style"]
    for judge, scores in block.items():
        for arm in scores["read"]:
            yield [judge, arm, percent(scores["read"][arm]), number(scores["style"][arm])]
        yield [judge, "chance", "", "0.50"]


def curve(points: Mapping[str, Results], heading: str) -> Iterator[Row]:
    """Yield a row for each point of a curve.

    Args:
        points: gains by number.
        heading: heading of the numbers.
    """
    yield [heading, "gain of the base's loss"]
    for key, values in points.items():
        yield [f"{float(key):g}", number(values["relative_gain"], ".1%")]


def sections(results: Results) -> Iterator[tuple[str, Iterator[Row]]]:
    """Yield the title and the rows of every table."""
    for key, block in results.items():
        if key.startswith("letters-"):
            count = key.removeprefix("letters-")
            yield f"{count} letters, {block['people']} people of a federation of {block['members']}", arms(block)
        elif key in ("newcomers", "donors"):
            yield f"{key} who join after the rounds", joined(block, key)
        elif key == "private":
            yield "private runs, shared adapter", private(block)
        elif key == "pictures":
            yield "drawn letters", pictures(block)
        elif key == "former base":
            yield "the same with the former base", arms(block)
        else:
            parts = {"federation": block} if key == "people" else block
            for arm in ("federation", "local"):
                if arm in parts:
                    yield f"gain by number of {key}: {arm}", curve(parts[arm], key)


def show(title: str, rows: Iterator[Row]) -> Table:
    """Return a table for the terminal; the first row has the headings."""
    table = Table(*next(rows), title=title)
    for row in rows:
        table.add_row(*(cell.replace("**", "") for cell in row))
    return table


def markdown(rows: Iterator[Row]) -> str:
    """Return a table of a page; the first row has the headings."""
    head = next(rows)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
