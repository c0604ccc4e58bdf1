"""Where what is a device's own lies: by its name in ANTHER_HOME, unless its owner chose another folder.

And how its owner's commands, `anther device ledger` and others, find it: all take the same two options, answer on
standard output, and say in one line what is wrong.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.atomic_files import write
from common.errors import REPORTED_ERRORS, AntherError, told
from common.terminal import use_plain_output
from models.base import assets
from privacy.ledger.anchors import parse_marker
from privacy.ledger.ledger import JOURNAL, MARKER
from privacy.storage import FileStorage

DONE, USAGE = 0, 2


def device_files(name: str, store: str | Path | None = None) -> FileStorage:
    """The files of the device of this name, in the folder `store`; their heads are in ANTHER_HOME all the same.

    By the name: another store under it isn't taken for a fresh device's. Only a store whose marker names a head that is
    there goes with that: it was kept under another name.
    """
    home = assets.home()
    files = FileStorage(store or home / "devices" / name, heads=home / "heads" / name)
    if not files.heads.exists() and (marker := files.read(MARKER)) is not None:
        head = Path(parse_marker(marker, files.where(MARKER)).head)
        if head.exists():
            return FileStorage(files.folder, heads=head.parent)
    return files


def own(name: str, store: str | None) -> FileStorage:
    """The files of the device that takes part from this ANTHER_HOME, whatever it is called by now.

    The ledger counts what was shared of the pictures, so it belongs to the store and not to a name: a device that was
    renamed goes on in the store that it had (`remember`).

    Raises:
        AntherError: which store it had isn't known, and there is one under another name.
    """
    if store is not None:
        return device_files(name, Path(store).expanduser())
    fresh, kept = assets.home() / "devices" / name, _remembered()
    if kept is not None:
        return device_files(name, kept)
    others = [] if fresh.exists() else _stores()
    if others:
        listed = ", ".join(map(str, others))
        raise AntherError(
            f"name={name}: nothing is kept under this name, and here is the ledger of another: {listed}. If it is this "
            f"device's, which was renamed, say store={others[0]}; if not, store={fresh}"
        )
    return device_files(name)


def remember(files: FileStorage) -> None:
    """Note which store the device that takes part from here has."""
    folder, home = files.folder.absolute(), assets.home().absolute()
    if _remembered() != folder:  # of a home that is moved or copied as a whole it goes along
        write(_note(), f"{folder.relative_to(home) if folder.is_relative_to(home) else folder}\n".encode())


def _note() -> Path:
    return assets.home() / "store"


def _remembered() -> Path | None:
    """The store that was noted, if it is there still."""
    try:
        found = assets.home().absolute() / _note().read_text(encoding="utf-8").rstrip("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise AntherError(
            f"{_note()}: can't be read ({error}): write the folder of this device's store there"
        ) from error
    return found if found.is_dir() else None


def _stores() -> list[Path]:
    """Folders of devices that have shared something."""
    found = (assets.home() / "devices").glob("*/")
    return sorted(folder for folder in found if (folder / MARKER).exists() or (folder / JOURNAL).exists())


def find(store: Path | None, name: str | None) -> FileStorage:
    """The files of the device that its node calls so, or whose store is there; without either, this machine's own.

    Raises:
        AntherError: the words of its enrolment can't be read.
    """
    if store is None and name is None:
        if words().exists():
            from conf.schemas.node import compose  # slow import, so only here

            node = compose([], words())
            return own(node.name or platform.node() or "device", node.store)
        store = _remembered()  # of a device that has left
    return device_files(name or (store.name if store else platform.node()) or "device", store)


def words() -> Path:
    """The words of this device's configuration, as its enrolment left them."""
    return assets.home() / "node.conf"


def link() -> Path:
    """The folder of its keys to a federation."""
    return assets.home() / "link"


def owner_parser(module: str, description: str) -> argparse.ArgumentParser:
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
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    act: Callable[[FileStorage, argparse.Namespace], str],
) -> int:
    """The process' exit status: DONE with what `act` says, or USAGE with one line on standard error."""
    use_plain_output()
    asked = parser.parse_args(arguments)
    try:
        print(act(find(asked.store, asked.name), asked))
    except REPORTED_ERRORS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return USAGE
    return DONE
