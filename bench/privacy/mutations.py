"""Is every way of breaking what is promised noticed by a test?  python -m bench.privacy.mutations [--only WORDS] [--jobs N]

Each mutant of `bench.privacy.mutants` and `bench.privacy.audit_mutants` is put into a copy of the source, in which its named test has
to fail; without a mutant all of those tests have to pass there. Each of the jobs has a copy of its own. The exit code
is 1 if a mutant survives, or doesn't fit the source any more.
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
PASSED, FAILED, BROKEN = 0, 1, 3  # exit codes of pytest; others than the first two: tests that could not be run
_CLUTTER = shutil.ignore_patterns(".*", "__pycache__", "outputs", "multirun", "build", "dist")


@dataclass(frozen=True)
class MutantVerdict:
    """What became of one mutant."""

    level: str
    """The unit that the broken promise is about, `image` or `device`; or `audit`, for what the audit itself sees."""
    mutant: Mutant
    caught: bool
    said: str
    """By the test that failed, in a line."""


@contextmanager
def copy_source() -> Iterator[Path]:
    """A copy of the code; assets and data are links to what is here."""

    def left_behind(folder: str, names: list[str]) -> set[str]:
        return _CLUTTER(folder, names) | ({"assets", "data"} if Path(folder) == ROOT / "typefaces" else set())

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "anther"
        shutil.copytree(ROOT, copy, ignore=left_behind)
        for name in ("assets", "data"):
            (copy / "typefaces" / name).symlink_to(ROOT / "typefaces" / name)
        yield copy


@contextmanager
def apply_mutant(mutant: Mutant, root: Path) -> Iterator[None]:
    """Put a mutant into the source below `root`, and take it out again.

    Raises:
        AntherError: the text that it replaces is not there, or not once.
    """
    file = root / mutant.file
    source = file.read_text(encoding="utf-8")
    if (found := source.count(mutant.old)) != 1:
        raise AntherError(
            f"{mutant.file}: {mutant.name}: {mutant.old!r} is there {found} times: mend bench/privacy/mutants.py"
        )
    file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(source, encoding="utf-8")


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """(exit code of pytest, its short summary or last line) in a process of its own, on the source below `root`.

    An error outside of a test isn't a failure of it: the code is then not `FAILED`.
    """
    # A byte code file is told from an outdated one by seconds and size, which a mutant may leave as they are.
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "250",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-rf", "-p", "no:cacheprovider", *tests]
    found = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = found.stdout.strip().splitlines() or found.stderr.strip().splitlines() or ["nothing was said"]
    failures = [line for line in lines if line.startswith("FAILED")]
    if found.returncode == FAILED and not failures:
        return BROKEN, lines[-1]
    return found.returncode, re.sub(r"^FAILED .*? - ", "", failures[0]) if failures else lines[-1]


def judge(level: str, mutant: Mutant, root: Path) -> MutantVerdict:
    """Whether the named test fails with the mutant in the source below `root`; AntherError if it doesn't fit."""
    with apply_mutant(mutant, root):
        code, said = run_tests(root, [mutant.test])
    return MutantVerdict(level, mutant, caught=code == FAILED, said=said)


def table(verdicts: Sequence[MutantVerdict]) -> Table:
    """A row for each mutant."""
    shown = Table(title="what is broken, and who notices")
    for heading in ("per", "mutation", "in", "test", "caught"):
        shown.add_column(heading, overflow="fold")
    for level, mutant, caught in ((verdict.level, verdict.mutant, verdict.caught) for verdict in verdicts):
        shown.add_row(level, mutant.name, mutant.file, mutant.test.removeprefix("tests/"), "yes" if caught else "NO")
    return shown


def record(verdicts: Sequence[MutantVerdict]) -> list[dict[str, Any]]:
    """The rows, for a file."""
    return [
        {"per": verdict.level, **verdict.mutant._asdict(), "caught": verdict.caught, "said": verdict.said[:300]}
        for verdict in verdicts
    ]


def select_mutants(only: str) -> list[tuple[str, Mutant]]:
    """All mutants with their level, or those of this level, or whose name holds these words."""
    levels = {"image": EXAMPLE_MUTANTS, "device": DEVICE_MUTANTS, "audit": AUDIT_MUTANTS}
    every = [(level, mutant) for level, mutants in levels.items() for mutant in mutants]
    return [(level, mutant) for level, mutant in every if only in (level, "") or only in mutant.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words that the name of a mutant holds, or image, device or audit")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are judged at once")
    parser.add_argument("--out", type=Path, default=Path("bench/results/mutations.json"))
    arguments = parser.parse_args()
    console = Console(width=200)
    mutants, copies = select_mutants(arguments.only), SimpleQueue[Path]()

    def judged(one: tuple[str, Mutant]) -> MutantVerdict:
        root = copies.get()
        try:
            verdict = judge(*one, root)
        finally:
            copies.put(root)
        console.print(f"{'caught' if verdict.caught else 'SURVIVED'}: {verdict.mutant.name}: {verdict.said}")
        return verdict

    with ExitStack() as held, ThreadPoolExecutor(arguments.jobs) as pool:
        for _ in range(arguments.jobs):
            copies.put(held.enter_context(copy_source()))
        untouched = held.enter_context(copy_source())
        honest = pool.submit(run_tests, untouched, sorted({mutant.test for _, mutant in mutants}))
        try:
            verdicts = list(pool.map(judged, mutants))
        except AntherError as error:
            sys.exit(str(error))
        code, said = honest.result()
    if code != PASSED:
        sys.exit(f"without a mutant: {said}")
    survivors = [verdict.mutant.name for verdict in verdicts if not verdict.caught]
    result = {
        "command": f"python -m bench.privacy.mutations --jobs {arguments.jobs} --only {shlex.quote(arguments.only)}",
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "pytest", "hypothesis", "dp-accounting"),
        "mutants": len(verdicts),
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
