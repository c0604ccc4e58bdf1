"""Where what is a device's own lies: by its name in ANTHER_HOME, unless its owner chose another folder."""

from __future__ import annotations

from pathlib import Path

from models import assets
from privacy.storage import Files


def files_of(name: str, store: str | Path | None = None) -> Files:
    """The files of the device of this name, in the folder `store`; their heads are in ANTHER_HOME all the same.

    By the name: another store under it isn't taken for a fresh device's.
    """
    home = assets.home()
    return Files(store or home / "devices" / name, heads=home / "heads" / name)
