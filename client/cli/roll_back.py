"""Go back to a personal adapter that this device had before its present one:  anther device roll-back [--to DATE]

The shared adapter that it was trained on comes back with it. `--list` names those that are kept, by the date on which
each was made; without a date it is the one before the present one, which stays among them. Nobody but the owner learns
of it: updates always start from the adapter that the server sends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from client.cli.paths import owner_parser, run
from client.store.open import check_store_exists, inspect_store, open_for_owner
from privacy.storage import FileStorage


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 2, with one line on standard error, if there is nothing to go back to."""
    parser = owner_parser("client.cli.roll_back", __doc__ or "")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--list", action="store_true", help="what is kept, and no change")
    which.add_argument("--to", metavar="DATE", help="the one of this date, as --list has it (default: the one before)")
    return run(parser, arguments, lambda files, asked: listed(files) if asked.list else roll_back(files, asked))


def roll_back(files: FileStorage, asked: argparse.Namespace) -> str:
    """Do it; what was done. AntherError if there is nothing to go back to."""
    with open_for_owner(files) as found:
        back = found.store.roll_back(asked.to)
    return f"{files.folder}: back at the adapters of {back.at}."


def listed(files: FileStorage) -> str:
    """What is kept, in words."""
    check_store_exists(files)
    personal_versions = inspect_store(files).store.personal_versions()
    lines = [f"{one.at}  base {one.base[:12]}{'  (in use)' if one.present else ''}" for one in personal_versions]
    return "\n".join(lines) or f"{files.folder}: nothing was learnt here yet"


if __name__ == "__main__":
    sys.exit(main())
