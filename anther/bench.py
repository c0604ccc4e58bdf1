"""Run a benchmark by its name:  anther bench NAME [options]"""

from __future__ import annotations

import difflib
import runpy
import sys

from anther.commands import benchmarks


def main() -> int:
    """Run the benchmark named by the first argument; without one, list all benchmarks."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(listing())
        return 0
    name, *arguments = sys.argv[1:]
    if name not in benchmarks():
        near = difflib.get_close_matches(name, benchmarks(), n=1)
        hint = f"did you mean {near[0]}?" if near else "anther bench lists them"
        print(f"error: anther bench {name}: no such benchmark; {hint}", file=sys.stderr)
        return 2
    sys.argv = [f"anther bench {name}", *arguments]
    runpy.run_module(benchmarks()[name][0], run_name="__main__")
    return 0


def listing() -> str:
    """List the benchmarks, one per line."""
    width = max(map(len, benchmarks()))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in benchmarks().items())
    return f"Measure a claim:  anther bench NAME [options]\n\n{lines}\n\nAdd --help to a name for its options."
