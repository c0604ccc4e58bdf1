"""Generate docs/people.md from the results:  anther bench people page"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.lib import plots
from bench.quality import people_tables as tables
from bench.quality.people_data import HELD_OUT, TEST
from bench.quality.people_tables import markdown, number, percent
from common.errors import AntherError, os_error

RESULTS = Path(__file__).parents[1] / "results" / "people.json"
DOCS = Path(__file__).parents[2] / "docs"
AXES = {
    "letters": "letters of each person",
    "steps": "optimizer steps of a device",
    "people": "people in the federation",
}


def write_page(file: Path = RESULTS, docs: Path = DOCS) -> Path:
    """Write the page, its plots, and the picture with drawings.

    Args:
        file: the results.
        docs: folder of the page.

    Raises:
        AntherError: the results can't be read, or are not those of test people.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        role, results = record["role"], record["results"]
    except OSError as error:
        raise os_error(error, file) from error
    except (ValueError, KeyError, TypeError) as error:
        raise AntherError(f"{file}: holds no results of people ({error}); run anther bench people measure") from error
    if role != TEST:
        raise AntherError(f"{file}: results of role={role}; the page needs those of --role {TEST}")
    docs.mkdir(parents=True, exist_ok=True)
    panels = curve_panels(results)
    if panels:
        (docs / "people-curves.svg").write_text(plots.curves(panels, y="gain, % of the base's loss"), encoding="utf-8")
    drawings = sheet_of(file)
    if drawings.exists():
        shutil.copyfile(drawings, docs / "people-drawings.png")
    page = docs / "people.md"
    page.write_text("\n".join(page_lines(record, drawings=drawings.exists(), plots=bool(panels))), encoding="utf-8")
    return page


def sheet_of(file: Path) -> Path:
    """Return the path of the picture with drawings that belongs to a results file."""
    return file.with_name(f"{file.stem}-drawings.png")


def curve_panels(results: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[float, ...]]]]:
    """Return the points of each plot by arm, in percent of the base's loss."""
    panels = {}
    for key, label in AXES.items():
        if key in results:
            parts = {"federation": results[key]} if key == "people" else results[key]
            panels[label] = {
                {"federation": "in a federation", "local": "local"}[arm]: [
                    (float(x), *(100 * part for part in values["relative_gain"])) for x, values in parts[arm].items()
                ]
                for arm in ("federation", "local")
                if arm in parts
            }
    return panels


def page_lines(record: Mapping[str, Any], *, drawings: bool, plots: bool) -> Iterator[str]:
    """Yield the lines of the page.

    Args:
        record: the results with their command and settings.
        drawings: whether there is a picture with drawings.
        plots: whether there are plots.
    """
    results = record["results"]
    yield "# Handwriting of real people\n"
    yield f"```sh\n{record['command']}\n```\n"
    yield (
        "Each person has a few of the own letters, on a device of their own, and wants to draw all others in the same "
        "hand. The people of this page took no part in any choice of settings, nor in the training of the base or the "
        "judge.\n"
    )
    yield "\n".join(f"- {line}" for line in answers(results)) + "\n"
    if drawings:
        yield (
            "Letters that were never trained on, drawn by the base, after local training, and in a federation; each "
            "row is one person. All pictures are generated.\n"
        )
        yield "![Drawn letters of six people](people-drawings.png)\n"
    if plots:
        yield "![Gain by letters, steps and people](people-curves.svg)\n"
    yield "## Aims\n"
    yield markdown(tables.aims(record["aims"]))
    yield "## Definitions\n"
    yield from (f"- {line}" for line in definitions(record))
    yield "\n## Results\n"
    for title, rows in tables.sections(results):
        yield f"### {title[0].upper()}{title[1:]}\n"
        yield markdown(rows)
    yield (
        "The letters are those of UNIPEN (International Unipen Foundation; doi 10.5281/zenodo.1195803, CC BY 4.0). "
        "They are not part of this project. Machine, versions and settings are in "
        "[people.json](../bench/results/people.json).\n"
    )


def answers(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the answers to the questions of a person with a device."""
    heads = {int(key.removeprefix("letters-")): block for key, block in results.items() if key.startswith("letters-")}
    for letters, block in sorted(heads.items(), reverse=True):
        yield (
            f"**{letters} letters of each person**: in a federation of {block['members']}, {block['people']} people "
            f"gain {number(block['ratio'])} times as much as by training locally, and "
            f"{percent(block['better'])} of them gain more than locally. If local training could stop at each person's "
            f"best step on the test letters, the ratio would be {number(block['oracle_ratio'])}."
        )
        if steps := block.get("steps"):
            yield (
                f"**How many steps?** {steps['rounds']:.0f} in the rounds and at most {steps['personal']} after them, "
                "each with up to four letters."
            )
    if points := results.get("letters", {}).get("federation"):
        gained = ", ".join(f"{key}: {values['relative_gain'][0]:.1%}" for key, values in points.items())
        yield f"**How many letters?** Reduction of the loss by number of letters: {gained}."
    if "steps" in results:
        fraction = results["steps"]["fraction"]
        reached = f"at {percent(fraction)} of its steps" if fraction else "not within the measured steps"
        yield (
            f"**How long?** A device in a federation reaches the lowest loss of local training {reached}, with the "
            "steps in the rounds counted. `anther device benchmark` measures the time of a step."
        )
    if points := results.get("people"):
        gained = ", ".join(f"{key}: {values['relative_gain'][0]:.1%}" for key, values in points.items())
        yield f"**How many people?** Reduction of the loss by number of people in the federation: {gained}."
    if "newcomers" in results:
        newcomers = results["newcomers"]
        yield (
            f"**Joining later** takes at most {newcomers['steps']} steps of the device, and gives "
            f"{percent(newcomers['share'])} of the gain of a member."
        )
        if newcomers.get("fraction"):
            yield (
                f"With {percent(newcomers['fraction'])} of the steps of local training at its best, newcomers have a "
                "lower loss."
            )
    if "donors" in results:
        yield f"**Hands of another origin**, without such members: {percent(results['donors']['share'])} of that gain."
    if "pictures" in results:
        scores = next(iter(results["pictures"].values()))
        read, style = scores["read"], scores["style"]
        yield (
            f"**Drawn letters**: the judge reads {percent(read['personal'])} as their captions, and "
            f"{percent(read['real'])} of the same people's real letters. The match of the style is "
            f"{number(style['personal'])}, that of real letters {number(style['real'])}, and chance is 0.5."
        )


def definitions(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the definitions of the page's numbers."""
    seeds = ", ".join(str(seed) for seed in record["seeds"])
    held_out = HELD_OUT["test"]
    yield f"The *gain* of an arm is the base's loss minus its loss, on {held_out} letters that were not trained on."
    yield (
        "*Local* is training without others: LoRA at attention layers or at all layers, with or without prior "
        "preservation, whichever was best on development people, with rate, rank, penalty and steps tuned for each "
        "number of letters. *Best step* stops each person by an oracle, on the test letters."
    )
    yield (
        "The *steps* of a device are all of its optimizer steps: those in the rounds and the personal ones. Local "
        "training gets as many."
    )
    yield (
        f"Seeds {seeds}. Ratios divide mean gains over the same people; intervals are 95 % bootstraps over people, who "
        "are drawn with all arms. Curves, newcomers and donors have the first seed only."
    )
    yield (
        "A letter is *read* if the judge names its caption; characters of the same shape count as one. The *style "
        "match* is the fraction of other people whose real letters are less similar to a drawn letter than the "
        "person's own. Both are measured on the same drawings: all held-out letters of all people, one drawing each "
        "for every seed."
    )
