"""Check that a test fails for each mutant, which breaks a privacy guarantee in the source.

    anther bench mutations [--only WORDS] [--tier unit|integration|stress] [--jobs N]

Each mutant of `bench.privacy.mutants` and `bench.privacy.audit_mutants` is applied to a copy of the source, in which
the test and tier that it names must fail; without a mutant all these tests must pass. Each job has its own copy. The
exit status is 1 if a mutant survives or no longer fits the source.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.privacy.audit_mutants import AUDIT_MUTANTS
from bench.privacy.mutants import DEVICE_MUTANTS, EXAMPLE_MUTANTS, Mutant
from common.errors import AntherError

ROOT = Path(__file__).parents[2]
PASSED, FAILED, BROKEN = 0, 1, 3  # pytest exit codes; any other than the first two: the tests could not run
TIERS = {"unit": "unit", "integration": "integration and not stress", "stress": "stress"}
"""Marker expressions that select the tests of each tier."""
_IGNORED = shutil.ignore_patterns(".*", "__pycache__", "outputs", "multirun", "build", "dist")


@dataclass(frozen=True)
class MutantVerdict:
    """Outcome of one mutant."""

    level: str
    """Privacy unit of the broken guarantee, `image` or `device`, or `audit` for mutants that the audit detects."""
    mutant: Mutant
    caught: bool
    message: str
    """Message of the failed test, in one line."""


@contextmanager
def copy_source() -> Iterator[Path]:
    """Copy the code to a temporary folder; assets and data are links to the originals."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        return _IGNORED(folder, names) | ({"assets", "data"} if Path(folder) == ROOT / "typefaces" else set())

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "anther"
        shutil.copytree(ROOT, copy, ignore=ignored)
        for name in ("assets", "data"):
            (copy / "typefaces" / name).symlink_to(ROOT / "typefaces" / name)
        yield copy


@contextmanager
def apply_mutant(mutant: Mutant, root: Path) -> Iterator[None]:
    """Apply a mutant to the source below `root`, and revert it afterwards.

    Raises:
        AntherError: the text to replace does not occur exactly once.
    """
    file = root / mutant.file
    source = file.read_text(encoding="utf-8")
    if (occurrences := source.count(mutant.old)) != 1:
        raise AntherError(
            f"{mutant.file}: {mutant.name}: {mutant.old!r} occurs {occurrences} times: update bench/privacy/mutants.py"
        )
    file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(source, encoding="utf-8")


def run_tests(root: Path, tests: Sequence[str], tier: str | None = None) -> tuple[int, str]:
    """Run tests in a new process on the source below `root`.

    Args:
        root: copy of the source.
        tests: names of the tests.
        tier: run only those of this tier; `None` for all.

    Returns:
        The exit code of pytest, and its short summary or last line. An error outside of a test is not a failure of it:
        the code is then not `FAILED`.
    """
    # Python detects outdated byte code by time in seconds and size of the source, which a mutant may leave unchanged.
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "250",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-rf", "-p", "no:cacheprovider"]
    command += ["-m", TIERS[tier] if tier else "", *tests]
    process = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = process.stdout.strip().splitlines() or process.stderr.strip().splitlines() or ["nothing was said"]
    failures = [line for line in lines if line.startswith("FAILED")]
    if process.returncode == FAILED and not failures:
        return BROKEN, lines[-1]
    return process.returncode, re.sub(r"^FAILED .*? - ", "", failures[0]) if failures else lines[-1]


def judge(level: str, mutant: Mutant, root: Path) -> MutantVerdict:
    """Apply a mutant to the source below `root`, and run the test that it names.

    Args:
        level: level of the mutant.
        mutant: the mutant.
        root: copy of the source.

    Raises:
        AntherError: the mutant does not fit the source.
    """
    with apply_mutant(mutant, root):
        code, message = run_tests(root, [mutant.test], mutant.tier)
    return MutantVerdict(level, mutant, caught=code == FAILED, message=message)


def table(verdicts: Sequence[MutantVerdict]) -> Table:
    """Return a table with a row for each mutant."""
    shown = Table(title="mutants and the tests that catch them")
    for heading in ("per", "mutation", "in", "test", "tier", "caught"):
        shown.add_column(heading, overflow="fold")
    for level, mutant, caught in ((verdict.level, verdict.mutant, verdict.caught) for verdict in verdicts):
        test = mutant.test.removeprefix("tests/")
        shown.add_row(level, mutant.name, mutant.file, test, mutant.tier, "yes" if caught else "NO")
    return shown


def record(verdicts: Sequence[MutantVerdict]) -> list[dict[str, Any]]:
    """Convert the verdicts to rows of the result file."""
    return [
        {"per": verdict.level, **verdict.mutant._asdict(), "caught": verdict.caught, "said": verdict.message[:300]}
        for verdict in verdicts
    ]


def select_mutants(only: str = "", tier: str | None = None) -> list[tuple[str, Mutant]]:
    """Return mutants with their level: all, those of one level, or those whose name contains `only`; of one tier."""
    levels = {"image": EXAMPLE_MUTANTS, "device": DEVICE_MUTANTS, "audit": AUDIT_MUTANTS}
    candidates = [(level, mutant) for level, mutants in levels.items() for mutant in mutants]
    named = [(level, mutant) for level, mutant in candidates if only in (level, "") or only in mutant.name]
    return [(level, mutant) for level, mutant in named if tier in (mutant.tier, None)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a mutant's name, or image, device or audit")
    parser.add_argument("--tier", choices=list(TIERS), help="only mutants that tests of this tier catch")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested in parallel")
    parser.add_argument("--out", type=Path, default=Path("bench/results/mutations.json"))
    arguments = parser.parse_args()
    console = Console(width=200)
    mutants, copies = select_mutants(arguments.only, arguments.tier), SimpleQueue[Path]()

    def judge_one(one: tuple[str, Mutant]) -> MutantVerdict:
        root = copies.get()
        try:
            verdict = judge(*one, root)
        finally:
            copies.put(root)
        console.print(f"{'caught' if verdict.caught else 'SURVIVED'}: {verdict.mutant.name}: {verdict.message}")
        return verdict

    with ExitStack() as stack, ThreadPoolExecutor(arguments.jobs) as pool:
        for _ in range(arguments.jobs):
            copies.put(stack.enter_context(copy_source()))
        untouched = stack.enter_context(copy_source())
        honest = pool.submit(run_tests, untouched, sorted({mutant.test for _, mutant in mutants}))
        try:
            verdicts = list(pool.map(judge_one, mutants))
        except AntherError as error:
            sys.exit(str(error))
        code, message = honest.result()
    if code != PASSED:
        sys.exit(f"without a mutant: {message}")
    survivors = [verdict.mutant.name for verdict in verdicts if not verdict.caught]
    words = ["--jobs", str(arguments.jobs), "--only", arguments.only]
    words += ["--tier", arguments.tier] if arguments.tier else []
    result = {
        "command": f"python -m bench.privacy.mutations {shlex.join(words)}",
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "pytest", "hypothesis", "dp-accounting"),
        "mutants": len(verdicts),
        "tiers": Counter(verdict.mutant.tier for verdict in verdicts),
        "survivors": survivors,
        "table": record(verdicts),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(table(verdicts))
    if survivors:
        sys.exit(f"{len(survivors)} of {len(verdicts)} survived: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
