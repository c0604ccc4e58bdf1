"""`python -m anther`: the same as the program `anther`."""

import sys

from anther.cli import main

if __name__ == "__main__":
    sys.exit(main())
