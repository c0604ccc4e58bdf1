"""Go back to the shared adapter that a device had before this one:  python -m client.roll_back [--store DIR]

What was personal on top of it comes back with it. Nobody but the owner learns of it: updates always start from the
adapter that the server sends.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from client.store import Store
from conf.errors import AntherError
from models import assets
from privacy.storage import Files


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2, with one line that says why, if there is nothing to go back to."""
    parser = argparse.ArgumentParser(prog="python -m client.roll_back", description=(__doc__ or "").splitlines()[0])
    default = assets.home() / "devices" / (platform.node() or "device")
    parser.add_argument("--store", type=Path, default=default, help="the device's folder (default: %(default)s)")
    folder = parser.parse_args(arguments).store
    try:
        Store(Files(folder)).roll_back()
    except AntherError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder}: back at the adapters before the last ones.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
