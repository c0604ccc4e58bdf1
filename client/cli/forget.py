"""Delete everything that this device has learned:  anther device forget --yes [--federation ID | --all]

Deletes the results of training on your pictures (adapters and state between rounds), previews and caches: of the last
federation, of the one with that id, or of all. The ledger stays; only `anther device ledger reset --forget` starts a
new one. Your pictures are not touched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from client.cli.common import owner_parser, run
from client.store import layout, migrate
from client.store.open import check_store_exists, last_federation
from common import atomic_files, file_lock
from common.errors import AntherError
from privacy.storage import ASIDE, FileStorage

NOTHING = "{folder}: nothing was learned here with {scope}."
FORGOTTEN = """Deleted from {folder}: {count} files, {megabytes:.1f} MB, of {scope}.
Not undone: everything shared is part of the shared adapter, and stays with all devices that have a copy. The ledger
still counts it (anther device ledger), and anything shared from now on adds to it.
The files were deleted but not overwritten: a memory card or flash disk may keep their bytes for a while, and so do
backups. If the store was encrypted, those bytes are useless without its key."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2, with one line on standard error, if it fails or --yes is missing."""
    parser = owner_parser("forget", __doc__ or "")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--federation", metavar="ID", help="id of the federation (default: the last one)")
    which.add_argument("--all", action="store_true", help="all federations")
    parser.add_argument("--yes", action="store_true", help="confirm")
    return run(parser, arguments, forget)


def forget(files: FileStorage, options: argparse.Namespace) -> str:
    """Delete the files; return a text that describes the effect and its limits.

    It needs no key, and can be repeated if it was killed.

    Raises:
        AntherError: --yes is missing, the federation is unknown, or the store is in use or of a newer version.
    """
    check_store_exists(files)
    federation = None if options.all else options.federation or last_federation(files)
    scope = (
        "all federations" if options.all else f"federation {federation}" if federation else "no federation with an id"
    )
    known = layout.federations(files.folder)
    if options.federation and federation not in known:
        ids = ", ".join(str(name) for name in known if name) or "none"
        raise AntherError(f"--federation {federation}: this store has no files of it; it has files of: {ids}")
    if not options.yes:
        raise AntherError(
            f"forget permanently deletes everything learned with {scope} in {files.folder}: confirm with --yes"
        )
    with file_lock.exclusive(files.folder, what="the store"):
        migrate.upgrade(files)
        deleted = [
            name
            for name in _learned_files(files.folder)
            if options.all or _federation_of(name) in (federation, _CACHED)
        ]
        size = sum((files.folder / name).stat().st_size for name in deleted)
        for name in deleted:
            files.remove(name)
        _clean_up(files.folder)
    text = FORGOTTEN if deleted else NOTHING
    return text.format(folder=files.folder, count=len(deleted), megabytes=size / 1e6, scope=scope)


_CACHED = ""  # the cache is shared by all federations, and can be recomputed


def _learned_files(folder: Path) -> Iterator[str]:
    """Yield the names of all files that may be deleted, including those set aside with a ledger."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        original = layout.split_name(name)[1]
        if path.is_file() and original.split("/")[0] in (*layout.FEDERATION_FILES, layout.CACHE):
            yield name


def _federation_of(name: str) -> str | None:
    """Return the id of a file's federation, or `_CACHED`."""
    federation, original = layout.split_name(name)
    return _CACHED if original.split("/")[0] == layout.CACHE else federation


def _clean_up(folder: Path) -> None:
    """Make the deletions durable, including those before a kill, and remove empty folders."""
    own_folders = (layout.FEDERATIONS, layout.PREVIEWS, layout.CACHE)
    for path in sorted(folder.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
        if layout.original_name(path.relative_to(folder).as_posix()).split("/")[0] in own_folders:
            atomic_files.sync_folder(path)
            if not any(path.iterdir()):
                path.rmdir()
    for path in (folder, *folder.glob(f"{ASIDE}-*/")):
        atomic_files.sync_folder(path)


if __name__ == "__main__":
    sys.exit(main())
