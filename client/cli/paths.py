"""Locate a device's files: by its name in ANTHER_HOME, unless its owner chose another folder.

This module is shared by the owner's commands, such as `anther device ledger`. They take the same two options, print to
standard output, and report an error in one line.
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
    """Return the files of the device with this name, in the folder `store`; the ledger's head is always in ANTHER_HOME.

    The head is found by the device's name, so that another store under that name isn't taken for a new device's. The
    exception is a store whose marker names an existing head: it was kept under another name.
    """
    home = assets.home()
    files = FileStorage(store or home / "devices" / name, heads=home / "heads" / name)
    if not files.heads.exists() and (marker := files.read(MARKER)) is not None:
        head = Path(parse_marker(marker, files.where(MARKER)).head)
        if head.exists():
            return FileStorage(files.folder, heads=head.parent)
    return files


def enrolled_files(name: str, store: str | None) -> FileStorage:
    """Return the files of the device that takes part from this ANTHER_HOME, even if it was renamed.

    The ledger counts releases about the pictures, so it belongs to the store and not to the name: a renamed device
    continues with its store (`remember`).

    Raises:
        AntherError: the device's previous store isn't known, and there is one under another name.
    """
    if store is not None:
        return device_files(name, Path(store).expanduser())
    default, remembered = assets.home() / "devices" / name, _remembered()
    if remembered is not None:
        return device_files(name, remembered)
    others = [] if default.exists() else _stores()
    if others:
        listed = ", ".join(map(str, others))
        raise AntherError(
            f"name={name}: there is no store of this name, but there is a ledger of another: {listed}. If this device "
            f"was renamed, set store={others[0]}; if it is a new device, set store={default}"
        )
    return device_files(name)


def remember(files: FileStorage) -> None:
    """Record the store of the device that takes part from this ANTHER_HOME."""
    folder, home = files.folder.absolute(), assets.home().absolute()
    if _remembered() != folder:  # a relative path stays valid if the whole home is moved or copied
        write(_note(), f"{folder.relative_to(home) if folder.is_relative_to(home) else folder}\n".encode())


def _note() -> Path:
    return assets.home() / "store"


def _remembered() -> Path | None:
    """Return the recorded store, if it still exists."""
    try:
        folder = assets.home().absolute() / _note().read_text(encoding="utf-8").rstrip("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise AntherError(
            f"{_note()}: can't be read ({error}): write the path of this device's store into this file"
        ) from error
    return folder if folder.is_dir() else None


def _stores() -> list[Path]:
    """List the folders of devices that have shared something."""
    folders = (assets.home() / "devices").glob("*/")
    return sorted(folder for folder in folders if (folder / MARKER).exists() or (folder / JOURNAL).exists())


def find_files(store: Path | None, name: str | None) -> FileStorage:
    """Return the files of the device with this name or store; without either, of this machine's own device.

    Raises:
        AntherError: the configuration that enrollment wrote can't be read.
    """
    if store is None and name is None:
        if config_file().exists():
            from conf.schemas.node import compose  # slow import, so only here

            node = compose([], config_file())
            return enrolled_files(node.name or platform.node() or "device", node.store)
        store = _remembered()  # a device that has left its federation
    return device_files(name or (store.name if store else platform.node()) or "device", store)


def config_file() -> Path:
    """Return the path of this device's configuration, written by enrollment."""
    return assets.home() / "node.conf"


def keys_folder() -> Path:
    """Return the folder of the device's keys for its federation."""
    return assets.home() / "link"


def owner_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Build the parser of an owner's command about one device."""
    parser = argparse.ArgumentParser(
        prog=f"anther device {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="folder of the device's store (default: in ANTHER_HOME)"
    )
    parser.add_argument(
        "--name", help="the device's name (default: as enrolled, else the store's or the machine's name)"
    )
    return parser


def run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    act: Callable[[FileStorage, argparse.Namespace], str],
) -> int:
    """Run an owner's command.

    Args:
        parser: the command's parser.
        arguments: the command line; None: that of the process.
        act: carries out the command and returns the text to print.

    Returns:
        The exit status: DONE, or USAGE with one line on standard error.
    """
    use_plain_output()
    options = parser.parse_args(arguments)
    try:
        print(act(find_files(options.store, options.name), options))
    except REPORTED_ERRORS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return USAGE
    return DONE
