"""Fuzz the readers of pictures, captions and bases.

    anther bench fuzz_inputs [--cases 20000] [--seed 0]

Inputs are pictures of every format, caption sheets, EXIF blocks, folder layouts, and bases of every family, each
generated from a seed and then damaged. A case is sound if the folder can be read and its pixels at every size and its
fingerprint can be computed, or if it is refused with one line that names a path. Any other outcome is a fault,
including the death of a process. Faults are reported with the seed that reproduces them: `--kind exif --only 123`.

To add a kind of input to `KINDS`, write a function that takes a random generator and an empty folder, and returns the
call that must be sound.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.robustness import damaged_bases, damaged_pictures
from client.data import fingerprint, load_folder
from common.errors import AntherError

Try = Callable[[], object]
SLOW = 10.0  # CPU seconds above which a case is a fault
CHUNK = 250  # cases per task of a process


@dataclass
class FuzzCounts:
    """Results of one kind of input."""

    read: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    """CPU seconds of the slowest case."""
    peak_mib: float = 0.0
    """Peak memory of the process in MiB."""

    def add(self, other: FuzzCounts) -> None:
        """Add the results of other cases."""
        self.read += other.read
        self.refused += other.refused
        self.faults += other.faults
        self.slowest = max(self.slowest, other.slowest)
        self.peak_mib = max(self.peak_mib, other.peak_mib)


def _folder(damage: Callable[[random.Random, Path], None]) -> Callable[[random.Random, Path], Try]:
    """Create the kind of input whose folder is damaged by `damage` and then read."""

    def attempt(rng: random.Random, folder: Path) -> Try:
        damage(rng, folder)
        return partial(read, folder)

    return attempt


KINDS: dict[str, Callable[[random.Random, Path], Try]] = {
    "picture": _folder(damaged_pictures.picture),
    "exif": _folder(damaged_pictures.exif),
    "sheet": _folder(damaged_pictures.sheet),
    "texts": _folder(damaged_pictures.texts),
    "layout": _folder(damaged_pictures.layout),
    "base": damaged_bases.base,
}


def read(folder: Path) -> None:
    """Read a folder like a run: pictures, pixels at every size, fingerprint."""
    pictures = load_folder(folder)
    for split in pictures:
        fingerprint(split)
        for picture in split:
            for pixels in (picture.pixels, picture.at_least(8)):
                if pixels.dtype != "uint8" or pixels.ndim not in (2, 3) or min(pixels.shape[:2]) < 8:
                    raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}")


def run_case(kind: str, seed: int) -> FuzzCounts:
    """Run one case and classify its outcome."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve() / "photos"
        folder.mkdir()
        rng = random.Random(f"{kind} {seed}")
        attempt = KINDS[kind](rng, folder)
        row, started = FuzzCounts(), time.process_time()
        try:
            attempt()
            row.read = 1
        except AntherError as error:
            row.refused = 1
            row.faults += [f"{kind} {seed}: {wrong}" for wrong in _defects(str(error), scratch)]
        except BaseException as error:
            row.faults.append(f"{kind} {seed}: {type(error).__name__}: {error}"[:300])
        row.slowest = time.process_time() - started
        if row.slowest > SLOW:
            row.faults.append(f"{kind} {seed}: took {row.slowest:.0f} s")
    row.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def run_cases(kind: str, seeds: Iterable[int]) -> FuzzCounts:
    """Run several cases in sequence."""
    warnings.simplefilter("ignore")
    total = FuzzCounts()
    for seed in seeds:
        total.add(run_case(kind, seed))
    return total


def run(cases: int, seed: int, kinds: Iterable[str], processes: int) -> dict[str, FuzzCounts]:
    """Run the same number of cases of every kind.

    Args:
        cases: number of cases in total.
        seed: seed of the first case.
        kinds: keys of `KINDS`.
        processes: number of worker processes.
    """
    rows = {kind: FuzzCounts() for kind in kinds}
    cases_per_kind = cases // len(rows)
    parts = [
        (kind, range(a, min(a + CHUNK, seed + cases_per_kind)))
        for kind in rows
        for a in range(seed, seed + cases_per_kind, CHUNK)
    ]
    while parts:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(run_cases, *part): part for part in parts}
            for future in as_completed(futures):
                kind, seeds = futures[future]
                try:
                    rows[kind].add(future.result())
                    parts.remove((kind, seeds))
                except BrokenProcessPool:  # the case that killed the process is unknown: bisect
                    parts = _bisect(parts, rows)
                    break
    return rows


def _bisect(parts: list[tuple[str, range]], rows: dict[str, FuzzCounts]) -> list[tuple[str, range]]:
    """Split the remaining parts in halves; a part with a single case killed its process, and is a fault."""
    left = []
    for kind, seeds in parts:
        if len(seeds) == 1:
            rows[kind].faults.append(f"{kind} {seeds[0]}: the process, or another of the pool, died")
        else:
            middle = len(seeds) // 2
            left += [(kind, seeds[:middle]), (kind, seeds[middle:])]
    return left


def _defects(line: str, scratch: str) -> list[str]:
    """List the defects of a refusal message."""
    defects = []
    if not line.isprintable():
        defects.append("isn't one printable line")
    if len(line) > 700 + len(scratch):
        defects.append(f"is {len(line)} characters long")
    if scratch not in line:
        defects.append(f"names no path: {line[:120]}")
    return defects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--only", type=int, help="run only the case of this seed, and show its traceback")
    parser.add_argument("--out", type=Path, default=Path("bench/results/fuzz_inputs.json"))
    args = parser.parse_args()
    if args.only is not None:
        with tempfile.TemporaryDirectory() as scratch:
            KINDS[args.kind](random.Random(f"{args.kind} {args.only}"), Path(scratch))()
        return
    rows = run(args.cases, args.seed, [args.kind] if args.kind else list(KINDS), args.processes)
    shown = Table("input", "cases", "read", "refused in one line", "faults", "slowest s", "peak MiB")
    for kind, row in rows.items():
        numbers = (row.read + row.refused + len(row.faults), row.read, row.refused, len(row.faults))
        shown.add_row(kind, *map(str, numbers), f"{row.slowest:.1f}", f"{row.peak_mib:.0f}")
    result = {
        "command": f"python -m bench.robustness.fuzz_inputs --cases {args.cases} --seed {args.seed}",
        "machine": machine(torch.device("cpu")),
        "versions": versions("pillow", "torch"),
        "kinds": {kind: asdict(row) for kind, row in rows.items()},
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=120).print(shown)
    faults = [fault for row in rows.values() for fault in row.faults]
    for kind, count in collections.Counter(fault.split(": ", 1)[1][:60] for fault in faults).most_common(20):
        print(f"{count} × {kind}", file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
