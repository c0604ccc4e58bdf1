"""Go back to the shared adapter that this device had before its present one:  python -m client.roll_back

What was personal on top of it comes back with it. Nobody but the owner learns of it: updates always start from the
adapter that the server sends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from client.home import owners_command, run
from client.opening import by_owner
from privacy.storage import Files


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 2, with one line on standard error, if there is nothing to go back to."""
    return run(owners_command("client.roll_back", __doc__ or ""), arguments, lambda files, _: roll_back(files))


def roll_back(files: Files) -> str:
    """Do it; what was done. AntherError if there is nothing to go back to."""
    with by_owner(files) as found:
        found.store.roll_back()
    return f"{files.folder}: back at the adapters before the last ones."


if __name__ == "__main__":
    sys.exit(main())
