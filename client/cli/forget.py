"""Remove what this device has learnt:  anther device forget --yes [--federation ID | --all]

Adapters, what rounds have left, previews and caches, of the federation that it was in last, of the one of that id, or
of all. The ledger stays: only `anther device ledger reset --forget` begins another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from client.cli.paths import owner_parser, run
from client.store import layout, migrate
from client.store.open import check_store_exists, last_federation
from common import atomic_files, file_lock
from common.errors import AntherError
from privacy.storage import ASIDE, FileStorage

NOTHING = "{folder}: nothing was learnt here of {whose}."
FORGOTTEN = """Removed from {folder}: {count} files, {megabytes:.1f} MB, of {whose}.
What can't be undone: what was shared stays shared, in the shared adapter and with everybody who has one. The ledger
still counts it (anther device ledger), and whatever is shared from now on comes on top.
The files were removed and not written over: a card or a flash disk may hold their bytes for a while, and so does every
backup. If the store was encrypted, they are of no use without its key."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 2, with one line on standard error, if it isn't meant, or the store is in use."""
    parser = owner_parser("client.cli.forget", __doc__ or "")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--federation", metavar="ID", help="that one (default: the last that the device was in)")
    which.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--yes", action="store_true", help="yes, remove it")
    return run(parser, arguments, forget)


def forget(files: FileStorage, asked: argparse.Namespace) -> str:
    """Do it; what was removed, and what that can't undo. It needs no key, and can be done again where it was killed.

    Raises:
        AntherError: its owner isn't sure, there is no such federation, or the store is in use or of a newer version.
    """
    check_store_exists(files)
    federation = None if asked.all else asked.federation or last_federation(files)
    whose = "all federations" if asked.all else f"federation {federation}" if federation else "no federation with an id"
    known = layout.federations(files.folder)
    if asked.federation and federation not in known:
        held = ", ".join(str(name) for name in known if name) or "none"
        raise AntherError(f"--federation {federation}: nothing is kept of it here; of these something is: {held}")
    if not asked.yes:
        raise AntherError(f"forget removes what was learnt of {whose} in {files.folder}, for good: say --yes")
    with file_lock.exclusive(files.folder, what="the store"):
        migrate.upgrade(files)
        doomed = [name for name in _learnt(files.folder) if asked.all or _whose(name) in (federation, _CACHED)]
        size = sum((files.folder / name).stat().st_size for name in doomed)
        for name in doomed:
            files.remove(name)
        _sweep(files.folder)
    text = FORGOTTEN if doomed else NOTHING
    return text.format(folder=files.folder, count=len(doomed), megabytes=size / 1e6, whose=whose)


_CACHED = ""  # belongs to whichever is forgotten: it is found again


def _learnt(folder: Path) -> Iterator[str]:
    """Names of all files that may go, also of those that were set aside with a ledger."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        rest = layout.split(name)[1]
        if path.is_file() and rest.split("/")[0] in (*layout.FEDERATION_FILES, layout.CACHE):
            yield name


def _whose(name: str) -> str | None:
    federation, rest = layout.split(name)
    return _CACHED if rest.split("/")[0] == layout.CACHE else federation


def _sweep(folder: Path) -> None:
    """Make removals durable, also those before a kill, and remove folders that are empty now."""
    ours = (layout.FEDERATIONS, layout.PREVIEWS, layout.CACHE)
    for path in sorted(folder.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
        if layout.original(path.relative_to(folder).as_posix()).split("/")[0] in ours:
            atomic_files.sync_folder(path)
            if not any(path.iterdir()):
                path.rmdir()
    for path in (folder, *folder.glob(f"{ASIDE}-*/")):
        atomic_files.sync_folder(path)


if __name__ == "__main__":
    sys.exit(main())
