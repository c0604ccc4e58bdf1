"""Leave the federation of this device:  anther device leave --yes

Deletes the device's keys and its configuration. Everything learned stays, and so does the ledger. Stop `anther device
run` first.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from client.cli.common import owner_parser, run
from client.paths import config_file, keys_folder
from common import atomic_files, file_lock
from common.errors import AntherError
from privacy.storage import FileStorage

LEFT = """This device has left {federation}: its keys ({link}) and its configuration ({words}) were deleted.
Effect: the device no longer trains in it and answers no requests. Also ask the federation's operator to revoke it:
until then, a copy of its key could be used in its name.
Kept: everything that it has learned, in {folder}. You can still draw with it (anther device draw --store {folder});
anther device forget deletes it. The ledger is kept too, because your pictures stay the same in another federation.
Not undone: everything shared is part of the shared adapter and of every adapter made from it, wherever they are now.
How much that can reveal about a picture: anther device ledger."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2, with one line on standard error, if it fails or --yes is missing."""
    parser = owner_parser("leave", __doc__ or "")
    parser.add_argument("--yes", action="store_true", help="confirm")
    return run(parser, arguments, lambda files, options: leave(files, options))


def leave(files: FileStorage, options: argparse.Namespace) -> str:
    """Delete keys and configuration; return a text that describes the effect and its limits.

    It can be repeated if it was killed.

    Raises:
        AntherError: the device is in no federation, --yes is missing, or the store is in use.
    """
    if not keys_folder().exists() and not config_file().exists():
        raise AntherError(f"{keys_folder()}: doesn't exist: this device is in no federation")
    if not options.yes:
        raise AntherError(
            f"leave deletes {keys_folder()} and {config_file()}, and a new ticket is needed to join again: "
            "confirm with --yes"
        )
    federation = _federation()
    with ExitStack() as locks:
        if files.folder.is_dir():
            locks.enter_context(file_lock.exclusive(files.folder, what="the store"))
        if keys_folder().exists():
            locks.enter_context(file_lock.exclusive(keys_folder(), what="this device's part in its federation"))
            shutil.rmtree(keys_folder())
        # The keys are durably deleted before the configuration that names their federation.
        atomic_files.sync_folder(keys_folder().parent)
        config_file().unlink(missing_ok=True)
        atomic_files.sync_folder(config_file().parent)
    return LEFT.format(federation=federation, link=keys_folder(), words=config_file(), folder=files.folder)


def _federation() -> str:
    """Return the name of the federation, for messages."""
    from conf.schemas.node import read_enrollment  # slow import, so only here

    try:
        address = [
            word.partition("=")[2] for word in read_enrollment(config_file()) if word.startswith("connection.address=")
        ]
    except AntherError:
        return "its federation"
    return f"the federation at {address[-1]}" if address else "its federation"


if __name__ == "__main__":
    sys.exit(main())
