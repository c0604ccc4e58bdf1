"""Gain of real people's handwriting in a federation.

    anther bench people tune FILE                      # development people choose the settings
    anther bench people measure FILE --role test       # test people are measured once per claim
    anther bench people page                           # docs/people.md

FILE is a Parquet file of `python -m typefaces.making.unipen`, with the roles development, test and extra. Extra people
are members of federations and are never measured. Finished runs are kept in `--runs`, and `--only` chooses blocks, so
that a measurement can be made in parts.

Federations of `measure` for 119 test and 121 extra people and three seeds:

    3 + 3   five letters, two letters          6   fewer steps of a device
    4       each without a fold of people      9   fewer people, with the same 40
    8       each without a donor               5   numbers of letters, only the 119
    15      privacy: reference, open, ε = 8 and 2 per image, 8 per device
    3       with --former-base

Not the GPU but the server's work on the CPU decides the duration: choose at most one job per core. On an H200 with 16
cores and 18 jobs, federations of 161 people took 2 min (25 rounds, device-level privacy) to 5 min (25 rounds, privacy
per image), and a round of 48 people at all linear layers 2.7 s. That was before the server's work was cut to a third.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.lib.machine import versions
from bench.quality import people_tables as tables
from bench.quality.people_aims import check_aims
from bench.quality.people_data import DEVELOPMENT, TEST, read_people, select
from bench.quality.people_measure import BLOCKS, Extent, measure
from bench.quality.people_page import RESULTS, sheet_of, write_page
from bench.quality.people_plan import PeopleExperiment
from bench.quality.people_settings import FILE, load_settings, save_settings
from bench.quality.people_tune import GRID, PARTS, tune
from bench.quality.people_work import describe_machine, open_workers
from common.errors import REPORTED_ERRORS, AntherError, describe_error
from simulations.report.results import nan_to_none

PACKAGES = ("torch", "diffusers", "flwr", "dp-accounting")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="anther bench people", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name, text in (("tune", "choose settings on development people"), ("measure", "measure people of a role")):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", type=Path, help="Parquet file of people")
        command.add_argument(
            "words", nargs="*", metavar="key=value", help="overrides of every run, directly after FILE"
        )
        command.add_argument("--jobs", type=int, default=1, help="processes")
        command.add_argument("--runs", type=Path, default=Path("outputs/people"), help="folder of the runs")
        command.add_argument("--settings", type=Path, help="settings file (default: the tuned settings)")
        command.add_argument("--seeds", type=int, nargs="+", default=[0] if name == "tune" else [0, 1, 2])
        command.add_argument("--headline", type=int, default=5, help="letters of each person")
        command.add_argument("--few", type=int, default=2, help="letters of the second comparison")
        command.add_argument("--letters", type=int, nargs="+", default=[1, 2, 5, 10, 20], help="numbers of letters")
    tuning, measuring = commands.choices["tune"], commands.choices["measure"]
    tuning.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to tune")
    tuning.add_argument("--grid", nargs="+", default=list(GRID), metavar="key=value,…", help="grid of the federation")
    tuning.add_argument("--federation", nargs="+", metavar="key=value", help="replaces the federation's overrides")
    tuning.add_argument("--changes", type=int, default=2, help="rounds of single changes of local training")
    tuning.add_argument("--out", type=Path, default=FILE)
    measuring.add_argument("--role", default=DEVELOPMENT, help=f"{TEST}: once per claim (default: %(default)s)")
    measuring.add_argument("--only", nargs="+", choices=BLOCKS, default=list(BLOCKS), help="blocks to measure")
    measuring.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 40, 80, 120], help="curve over steps")
    measuring.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 40, 80, 160], help="curve over people")
    measuring.add_argument("--panel", type=int, default=40, help="people who are measured at every size")
    measuring.add_argument("--folds", type=int, default=4, help="folds of newcomers")
    measuring.add_argument("--donors", type=int, default=5, help="fewest people of a donor that is left out")
    measuring.add_argument("--former-base", type=Path, help="folder of a second base")
    measuring.add_argument("--former-judge", type=Path, help="folder of a second judge")
    measuring.add_argument("--out", type=Path, help=f"results (default for {TEST}: bench/results/people.json)")
    page = commands.add_parser("page", help="write docs/people.md")
    page.add_argument("--results", type=Path, default=RESULTS)
    page.add_argument("--docs", type=Path, default=write_page.__defaults__[1] if write_page.__defaults__ else None)
    return top


def main(words: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit status."""
    arguments = parser().parse_args(words)
    try:
        if arguments.command == "page":
            print(write_page(arguments.results, arguments.docs))
        elif arguments.command == "tune":
            run_tune(arguments)
        else:
            run_measure(arguments)
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    return 0


def run_tune(arguments: argparse.Namespace) -> None:
    """Tune settings and write them."""
    experiment = _experiment(arguments, DEVELOPMENT)
    started = time.perf_counter()
    with open_workers(arguments.runs, arguments.jobs) as workers:
        settings, scores = tune(
            experiment,
            workers,
            arguments.only,
            grid=arguments.grid,
            letters=arguments.letters,
            headline=(arguments.headline, arguments.few),
            changes=arguments.changes,
        )
        record = {**_record(started), "machine": workers.call(describe_machine).result(), "scores": scores}
    save_settings(arguments.out, settings, nan_to_none(record))
    Console().print(f"{arguments.out}: settings of {', '.join(arguments.only)}")


def run_measure(arguments: argparse.Namespace) -> None:
    """Measure people of a role, write the results and print tables."""
    out = arguments.out or (RESULTS if arguments.role == TEST else arguments.runs / f"{arguments.role}.json")
    if arguments.role != TEST and out.resolve() == RESULTS.resolve():
        raise AntherError(f"--out {out}: is for results of --role {TEST}; name another file")
    experiment = _experiment(arguments, arguments.role)
    extent = Extent(
        headline=arguments.headline,
        few=arguments.few,
        letters=tuple(sorted(arguments.letters)),
        steps=tuple(arguments.steps),
        sizes=tuple(arguments.sizes),
        panel=arguments.panel,
        folds=arguments.folds,
        donors=arguments.donors,
    )
    started = time.perf_counter()
    with open_workers(arguments.runs, arguments.jobs) as workers:
        results = measure(
            experiment,
            workers,
            extent,
            arguments.only,
            former_base=arguments.former_base,
            former_judge=arguments.former_judge,
            sheet=sheet_of(out),
        )
        used = workers.call(describe_machine).result()
    aims = check_aims(results)
    settings = dataclasses.asdict(experiment.settings)
    record = {**_record(started), "machine": used, "role": arguments.role, "seeds": list(experiment.seeds)}
    record |= {"extent": dataclasses.asdict(extent), "settings": settings, "aims": aims, "results": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(nan_to_none(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    console = Console(width=160)
    for title, rows in [*tables.sections(results), ("aims", tables.aims(aims))]:
        console.print(tables.show(title, iter(rows)))
    console.print(str(out))


def _experiment(arguments: argparse.Namespace, role: str) -> PeopleExperiment:
    settings = load_settings(arguments.settings)
    if getattr(arguments, "federation", None):
        settings = dataclasses.replace(settings, federation=tuple(arguments.federation), by_letters={})
    people = read_people(arguments.file)
    select(people, role)  # an error before anything runs
    return PeopleExperiment(
        file=arguments.file,
        people=people,
        role=role,
        settings=settings,
        folder=arguments.runs,
        words=tuple(arguments.words),
        seeds=tuple(arguments.seeds),
    )


def _record(started: float) -> dict[str, Any]:
    """Return the command and the versions; of paths only their last parts."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "command": " ".join(["anther bench people", *words]),
        "versions": versions(*PACKAGES),
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    sys.exit(main())
