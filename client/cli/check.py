"""Check a folder of pictures as training reads it.

    anther device doctor FOLDER [--sheet FILE] [--base NAME]

Each file gets one line: used, converted (and how), skipped or refused (and why). Nothing leaves the device. The exit
status is 0, or 2 if training could not start.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from client.data import load_folder
from common.errors import REPORTED_ERRORS, AntherError, describe_error
from common.terminal import use_plain_output

DONE, USAGE = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as `python -m client.cli.check FOLDER`."""
    options = _parser().parse_args(arguments)
    try:
        folder = _with_enrolled(options)
        if options.quiet:
            load_folder(folder, background=options.background, caption=options.caption)
            return DONE
        use_plain_output()
        return _report(folder, options)
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anther device doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="folder of pictures (default: the enrolled one)")
    parser.add_argument("--caption", help="one caption for all pictures, or with {text} a text around their own")
    parser.add_argument("--background", help="color behind transparent pictures")
    parser.add_argument("--base", help="base whose text encoder measures the captions")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet, a PNG with all crops")
    parser.add_argument("--quiet", action="store_true", help="print only the first mistake")
    return parser


def _with_enrolled(options: argparse.Namespace) -> str:
    """Take options that are not given from the device's configuration, and return the folder.

    Raises:
        AntherError: no folder is given, and none is enrolled.
    """
    from client import paths
    from conf.schemas.node import compose

    node = compose([], paths.config_file())
    options.background = options.background or node.background
    options.caption = node.caption if options.caption is None else options.caption
    folder: str | None = node.data if options.folder is None else options.folder
    if folder is None:
        raise AntherError("no folder of pictures is enrolled: anther device doctor FOLDER")
    return folder


def _report(folder: str, options: argparse.Namespace) -> int:
    from client.data.contact_sheet import write_contact_sheet
    from client.data.inspection import inspect_folder

    count_cut = _token_counter(options.base) if options.base else lambda _: 0
    found = inspect_folder(folder, background=options.background, caption=options.caption, count_cut=count_cut)
    for file in found.files:
        print(file)
    for mistake in found.mistakes:
        print(f"error: {mistake}")
    verdicts = Counter(file.verdict for file in found.files)
    parts = (found.counts, dict(sorted(verdicts.items())))
    print("; ".join(", ".join(f"{count} {name}" for name, count in part.items()) for part in parts if part))
    if options.sheet:
        write_contact_sheet(options.sheet, Path(folder).expanduser(), found.files)
        print(f"contact sheet: {options.sheet}")
    return DONE if found.usable else USAGE


def _token_counter(base: str) -> Callable[[str], int]:
    from models.families.checkpoint import recognize
    from models.files import assets

    return recognize(assets.locate(base)).token_counter()


if __name__ == "__main__":
    sys.exit(main())
