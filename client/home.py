"""Where what is a device's own lies: by its name in ANTHER_HOME, unless its owner chose another folder.

And how its owner's commands, `python -m client.ledger` and others, find it: all take the same two options, answer on
standard output, and say in one line what is wrong.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from conf.errors import TOLD, told
from conf.terminal import use_plain_output
from models import assets
from privacy.anchors import read_marker
from privacy.ledger import MARKER
from privacy.storage import Files

DONE, USAGE = 0, 2


def files_of(name: str, store: str | Path | None = None) -> Files:
    """The files of the device of this name, in the folder `store`; their heads are in ANTHER_HOME all the same.

    By the name: another store under it isn't taken for a fresh device's.
    """
    home = assets.home()
    return Files(store or home / "devices" / name, heads=home / "heads" / name)


def find(store: Path | None, name: str | None) -> Files:
    """The files of the device that its node calls so, or whose store is there; without either, this machine's own.

    Raises:
        AntherError: the words of its enrolment can't be read.
    """
    if store is None and name is None and words().exists():
        from conf.node import compose  # slow import, so only here

        node = compose([], words())
        store, name = None if node.store is None else Path(node.store).expanduser(), node.name
    files = files_of(name or (store.name if store else platform.node()) or "device", store)
    if store and not name and (marker := files.read(MARKER)) is not None:
        head = Path(read_marker(marker, files.where(MARKER)).head)
        files = Files(store, heads=head.parent)
    return files


def words() -> Path:
    """The words of this device's configuration, as its enrolment left them."""
    return assets.home() / "node.conf"


def link() -> Path:
    """The folder of its keys to a federation."""
    return assets.home() / "link"


def owners_command(module: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command that an owner runs about one device of theirs."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, metavar="DIR", help="the node's `store` (default: in ANTHER_HOME)")
    parser.add_argument(
        "--name", help="the node's `name` (default: as enrolled, what the store says, or the machine's)"
    )
    return parser


def run(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, act: Callable[[Files, argparse.Namespace], str]
) -> int:
    """The process' exit status: DONE with what `act` says, or USAGE with one line on standard error."""
    use_plain_output()
    asked = parser.parse_args(arguments)
    try:
        print(act(find(asked.store, asked.name), asked))
    except TOLD as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return USAGE
    return DONE
