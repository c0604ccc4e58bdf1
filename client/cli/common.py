"""Shared parts of the owner's commands: options that select a device, and errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from client import paths
from client.store.open import inspect_store
from common.errors import REPORTED_ERRORS, describe_error
from common.plugins import allow_plugins
from common.terminal import discard_output, use_plain_output
from privacy.ledger.ledger import JOURNAL, MARKER, DeviceLedger, LedgerHistory
from privacy.storage import FileStorage

DONE, USAGE = 0, 2


def owner_parser(command: str, description: str, *, group: str = "device ") -> argparse.ArgumentParser:
    """Build the parser of an owner's command about one device.

    Args:
        command: name of the command.
        description: its help.
        group: words before the name.
    """
    parser = argparse.ArgumentParser(
        prog=f"anther {group}{command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="folder of the device's store (default: in ANTHER_HOME)"
    )
    parser.add_argument(
        "--name", help="the device's name (default: as enrolled, else the store's or the machine's name)"
    )
    return parser


def allow_owned_plugins() -> None:
    """Allow the plug-ins that the owner lists in the device's configuration, for a base of an installed family.

    Raises:
        AntherError: the enrollment's file can't be read.
    """
    from conf.schemas.node import compose  # slow import that most commands don't need

    allow_plugins(compose([], paths.config_file()).allowed_plugins)


def read_history(files: FileStorage) -> LedgerHistory:
    """Read the history of the device's ledger; it is empty if the device has shared nothing.

    Raises:
        AntherError: the ledger is damaged, or contradicts its anchors.
    """
    known = any(path.exists() for path in (files.folder / JOURNAL, files.folder / MARKER, files.heads / JOURNAL))
    return DeviceLedger(inspect_store(files).storage).history() if known else LedgerHistory()


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
        print(act(paths.find_files(options.store, options.name), options))
    except BrokenPipeError:  # the reader of our output closed it
        discard_output()
        return USAGE
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return USAGE
    return DONE
