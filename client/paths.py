"""Locate a device's files: by its name in ANTHER_HOME, unless its owner chose another folder."""

from __future__ import annotations

import platform
from pathlib import Path

from common.atomic_files import write
from common.errors import AntherError
from models.files import assets
from privacy.ledger.anchors import parse_marker
from privacy.ledger.ledger import JOURNAL, MARKER
from privacy.storage import FileStorage


def device_files(name: str, store: str | Path | None = None) -> FileStorage:
    """Return the files of the device with this name, in the folder `store`; the ledger's head is always in ANTHER_HOME.

    The head is located by the device's name, so that another store under that name isn't mistaken for that of a new
    device. The exception is a store with a marker that names an existing head: it was used under another name.
    """
    home = assets.home()
    files = FileStorage(store or home / "devices" / name, heads=home / "heads" / name)
    if not files.heads.exists() and (marker := files.read(MARKER)) is not None:
        head = Path(parse_marker(marker, files.where(MARKER)).head)
        if head.exists():
            return FileStorage(files.folder, heads=head.parent)
    return files


def enrolled_files(name: str, store: str | None) -> FileStorage:
    """Return the files of the device enrolled in this ANTHER_HOME, even if it was renamed.

    The ledger counts releases about the pictures, so it belongs to the store and not to the name: a renamed device
    continues with its store (`remember`).

    Raises:
        AntherError: the device's previous store isn't recorded, and a store exists under another name.
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
            f"name={name}: no store has this name, but another name has a ledger: {listed}. If this device "
            f"was renamed, set store={others[0]}; if it is a new device, set store={default}"
        )
    return device_files(name)


def remember(files: FileStorage) -> None:
    """Record the store of the device enrolled in this ANTHER_HOME."""
    folder, home = files.folder.absolute(), assets.home().absolute()
    if _remembered() != folder:  # a relative path stays valid if the whole home is moved or copied
        write(_store_record(), f"{folder.relative_to(home) if folder.is_relative_to(home) else folder}\n".encode())


def _store_record() -> Path:
    return assets.home() / "store"


def _remembered() -> Path | None:
    """Return the recorded store, if it still exists."""
    try:
        folder = assets.home().absolute() / _store_record().read_text(encoding="utf-8").rstrip("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise AntherError(
            f"{_store_record()}: can't be read ({error}): write the path of this device's store into this file"
        ) from error
    return folder if folder.is_dir() else None


def _stores() -> list[Path]:
    """List the folders of devices that have shared something."""
    folders = (assets.home() / "devices").glob("*/")
    return sorted(folder for folder in folders if (folder / MARKER).exists() or (folder / JOURNAL).exists())


def find_files(store: Path | None, name: str | None) -> FileStorage:
    """Return the files of the device with this name or store; without either, of the device of this machine.

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
