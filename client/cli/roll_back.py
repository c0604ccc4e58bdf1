"""Return to an earlier result of training on your pictures:  anther device roll-back [--to DATE]

Each training stores a personal adapter, a small addition to the base model; `--list` lists them by date. Without a
date, the one before the current adapter is restored, together with the shared adapter that it was trained on. The
current one stays stored. The server isn't notified: updates always start from the adapter that the server sends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from client.cli.common import owner_parser, run
from client.store.open import check_store_exists, inspect_store, open_for_owner
from privacy.storage import FileStorage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2, with one line on standard error, if there is no previous adapter."""
    parser = owner_parser("roll-back", __doc__ or "")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--list", action="store_true", help="list the stored adapters and change nothing")
    which.add_argument("--to", metavar="DATE", help="date as shown by --list (default: the previous one)")
    return run(
        parser, arguments, lambda files, options: list_versions(files) if options.list else roll_back(files, options)
    )


def roll_back(files: FileStorage, options: argparse.Namespace) -> str:
    """Restore the adapter and return a confirmation; AntherError if there is no such adapter."""
    with open_for_owner(files) as store:
        version = store.store.roll_back(options.to)
    return f"{files.folder}: the adapters of {version.created} are in use again."


def list_versions(files: FileStorage) -> str:
    """Return the list of stored adapters as text."""
    check_store_exists(files)
    personal_versions = inspect_store(files).store.personal_versions()
    lines = [
        f"{version.created}  base {version.base[:12]}{'  (in use)' if version.is_current else ''}"
        for version in personal_versions
    ]
    return "\n".join(lines) or f"{files.folder}: nothing was learned here yet"


if __name__ == "__main__":
    sys.exit(main())
