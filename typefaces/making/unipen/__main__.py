"""Write a Parquet file of people's handwriting:  python -m typefaces.making.unipen FOLDER OUT

FOLDER is the unpacked UNIPEN distribution train_r01_v07 (doi 10.5281/zenodo.1195803), OUT the Parquet file to write.
Pictures are 64 × 64 pixels of isolated digits and letters, at most two per person and character.

Damaged files are skipped and named. Not run on the whole distribution: tested on small files in its format.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import atomic_files
from common.errors import REPORTED_ERRORS, AntherError, describe_error
from typefaces.making.unipen import distribution, roles, table

USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m typefaces.making.unipen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    options = parser.parse_args(arguments)
    try:
        print(convert(options.folder, options.out))
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return USAGE
    return 0


def convert(folder: Path, out: Path) -> str:
    """Write the file of a distribution.

    Args:
        folder: the distribution.
        out: the Parquet file.

    Returns:
        A summary: people by role, pictures, segments left out, damaged files.

    Raises:
        AntherError: there is nothing to write, or the file can't be written here.
    """
    if out.is_dir():
        raise AntherError(f"{out}: is a folder: name the Parquet file to write, such as {out / 'people.parquet'}")
    atomic_files.make_folder(out.parent)  # fails before the work, not after it
    extract = distribution.extract(folder)
    rows = list(table.rows(extract.glyphs))
    if not rows:
        damaged = f" (damaged files: {len(extract.damaged)}; {extract.damaged[0]})" if extract.damaged else ""
        raise AntherError(
            f"{folder}: no person wrote {roles.FEWEST} different letters and digits in data/1a, 1b and 1c{damaged}: "
            "unpack all of train_r01_v07"
        )
    atomic_files.write(out, table.encode(rows))
    return summarize(extract, rows, out)


def summarize(extract: distribution.Extract, rows: Sequence[dict[str, Any]], out: Path) -> str:
    """Describe the file, the segments left out, and the damaged files.

    Args:
        extract: the distribution's characters.
        rows: rows of the file.
        out: the file.
    """
    by_role = Counter(dict.fromkeys(("development", "test", "extra"), 0))
    by_role.update({row["person"]: row["role"] for row in rows}.values())
    everyone = {glyph.person for glyph in extract.glyphs}
    people = ", ".join(f"{count} {role}" for role, count in by_role.items())
    lines = [
        f"{out}: {by_role.total()} people ({people}), {len(rows)} pictures, {out.stat().st_size / 1e6:.2f} MB",
        f"read: {len(extract.glyphs)} characters of {len(everyone)} people; "
        f"left out with fewer than {roles.FEWEST} different ones: {len(everyone) - by_role.total()} people",
    ]
    if extract.left_out:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(extract.left_out.items()))
        lines.append(f"segments left out: {reasons}")
    if extract.damaged:
        lines += [f"damaged files skipped: {len(extract.damaged)}", *(f"  {message}" for message in extract.damaged)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
