"""Leave the federation that this device was enrolled with:  anther device leave --yes

Its link, keys and configuration are removed. What was learnt stays, and so does the ledger. Stop the node first.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from client.cli.paths import link, owner_parser, run, words
from common import atomic_files, file_lock
from common.errors import AntherError
from privacy.storage import FileStorage

LEFT = """This device has left {federation}: its keys, {link}, and its words, {words}, are gone from here.
Undone: it can't take part any more, nor be asked for anything. Ask the federation's operator to revoke it as well:
until then, whoever has a copy of its key can speak in its name.
Kept: what it has learnt, in {folder}, which draws as before (anther device draw --store {folder});
anther device forget removes it. The ledger stays too: the pictures are the same in another federation.
What can't be undone: what was shared is part of the shared adapter, and of every one that was made from it, wherever
they are by now. What that tells of a picture, anther device ledger says."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 2, with one line on standard error, if there is nothing to leave, or it isn't meant."""
    parser = owner_parser("client.cli.leave", __doc__ or "")
    parser.add_argument("--yes", action="store_true", help="yes, leave")
    return run(parser, arguments, lambda files, asked: leave(files, asked))


def leave(files: FileStorage, asked: argparse.Namespace) -> str:
    """Do it; what that undoes and what it can't. Killed on the way it can be done again.

    Raises:
        AntherError: the device is in no federation, its owner isn't sure, or its store is in use.
    """
    if not link().exists() and not words().exists():
        raise AntherError(f"{link()}: isn't there: this device is in no federation")
    if not asked.yes:
        raise AntherError(f"leave removes {link()} and {words()}; it takes a new ticket to come back: say --yes")
    told = _federation()
    with ExitStack() as held:
        if files.folder.is_dir():
            held.enter_context(file_lock.exclusive(files.folder, what="the store"))
        if link().exists():
            held.enter_context(file_lock.exclusive(link(), what="this device's part in its federation"))
            shutil.rmtree(link())
        atomic_files.sync_folder(link().parent)  # the keys are gone for good before what says whose they were
        words().unlink(missing_ok=True)
        atomic_files.sync_folder(words().parent)
    return LEFT.format(federation=told, link=link(), words=words(), folder=files.folder)


def _federation() -> str:
    """How its words call it."""
    from conf.schemas.node import read_enrollment  # slow import, so only here

    try:
        address = [
            word.partition("=")[2] for word in read_enrollment(words()) if word.startswith("connection.address=")
        ]
    except AntherError:
        return "its federation"
    return f"the federation at {address[-1]}" if address else "its federation"


if __name__ == "__main__":
    sys.exit(main())
