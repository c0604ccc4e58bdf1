"""Script that runs a simulation and writes its memory after each round, for `tests/simulations/test_scale.py`.

Resident memory is measured after garbage collection and after the allocator has returned its free pages, so that it is
the memory still in use rather than a peak.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.rounds import handler
from conf.compose import compose
from simulations import run
from simulations.fleet.storage import FILE
from simulations.report.display import Display


def resident() -> int:
    """Return the resident memory in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class MeasuringDisplay(Display):
    """Measures memory and open resources after each round."""

    def __init__(self, rounds: int, folder: Path, out: Path) -> None:
        super().__init__(rounds)
        self._folder, self._out = folder, out

    def round(self, record: Mapping[str, Any]) -> None:
        super().round(record)
        measured = {
            "round": record["round"],
            "asked": record["asked"],
            "replied": record["replied"],
            "seconds": record["seconds"],
            "resident": resident(),
            "files": open_files(),
            "conversations": sum(
                inspect.isgenerator(item) and item.gi_code is handler.handle.__code__ for item in gc.get_objects()
            ),
            "database": sum(file.stat().st_size for file in (self._folder / "devices").glob(f"{FILE}*")),
        }
        with self._out.open("a") as file:
            file.write(json.dumps(measured) + "\n")


def main(folder: str, out: str, overrides: str) -> None:
    config = compose(overrides)
    with MeasuringDisplay(config.rounds, Path(folder), Path(out)) as display:
        run.simulate(config, Path(folder), display)


if __name__ == "__main__":
    main(*sys.argv[1:])
