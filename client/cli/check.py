"""Check a folder of pictures as training does: exit status 0, or 2 with one line that names the mistake."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from client.data import load_folder
from common.errors import REPORTED_ERRORS, describe_error

DONE, USAGE = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as `python -m client.cli.check FOLDER`."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    try:
        load_folder(folder)
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return USAGE
    return DONE


if __name__ == "__main__":
    sys.exit(main())
