"""Entry point of `python -m anther`, the same as the console script `anther`."""

import sys

from anther.cli import main

if __name__ == "__main__":
    sys.exit(main())
