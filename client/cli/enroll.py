"""Join a federation with this device:  anther device enroll [--ticket-file FILE] [data=FOLDER] [key=value …]

You got the ticket from the federation's operator; it works once. You are asked for it, or it is read from a file or
standard input, because other users of this machine can see a command line. All other settings given here (keys of
conf/schemas/node.py, e.g. name=NAME) are saved in ANTHER_HOME/node.conf for `anther device run`.
"""

from __future__ import annotations

import argparse
import getpass
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from client import paths
from client.runtime import server_connection
from common.atomic_files import write
from common.errors import AntherError, os_error
from conf.schemas.node import compose, read_enrollment
from protocol import ticket as tickets
from protocol.handshake import ServerHello

DONE, USAGE = 0, 2
_MAX_TICKET = 4096  # characters
_TICKET_SCHEME = "anther://"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status, USAGE with one line on standard error after an error."""
    parser = argparse.ArgumentParser(
        prog="anther device enroll", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ticket-file", metavar="FILE", help="file that contains the ticket; -: standard input (default: ask for it)"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        if any(word.startswith(_TICKET_SCHEME) for word in options.settings):
            raise AntherError(
                "a ticket on the command line is visible to every user of this machine, and stays in the shell's "
                "history: leave it out and paste it when asked, or use --ticket-file FILE"
            )
        checked = _checked_settings(options.settings)
        print(enroll(ticket_text(options.ticket_file), checked))
    except AntherError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except (EOFError, KeyboardInterrupt):
        print("error: no ticket was entered: paste it when asked, or use --ticket-file FILE", file=sys.stderr)
        return USAGE
    return DONE


def _checked_settings(settings: Sequence[str]) -> Sequence[str]:
    """Return the settings after checking them and the pictures: the ticket works only once, so it is read afterwards.

    Raises AntherError if anything is wrong.
    """
    node = compose(settings, paths.config_file())
    if node.data is not None:
        from client.data import load_folder  # torch

        load_folder(node.data, background=node.background, caption=node.caption)
    return settings


def ticket_text(file: str | None) -> str:
    """Read the ticket from a file, from standard input, or from the terminal without showing it."""
    try:
        if file not in (None, "-"):
            with Path(str(file)).expanduser().open(encoding="utf-8") as content:
                return content.read(_MAX_TICKET)
        if file is None and sys.stdin.isatty():
            return getpass.getpass("Ticket (it isn't shown): ")
        return sys.stdin.readline(_MAX_TICKET)
    except OSError as error:
        raise os_error(error, file) from error
    except UnicodeDecodeError as error:
        raise AntherError(f"{file or 'standard input'}: not a text file, so not a ticket") from error


def enroll(text: str, settings: Sequence[str]) -> str:
    """Join with a ticket and save the settings; return the next steps as text."""
    ticket, file = tickets.parse(text), paths.config_file()
    node = compose(settings, file)
    name = node.name or platform.node() or "device"
    connection, hello = server_connection.enroll(ticket, name)
    entries = [
        *read_enrollment(file),
        *settings,
        f"name={name}",
        f"connection.address={connection.address}",
        "connection.insecure=false",
    ]
    entries.append(f"federation={hello.federation}")
    last = {word.partition("=")[0]: word for word in entries}
    for key, folder in (("data", node.data), ("store", node.store)):
        if folder is not None:  # the device may later run in another folder, and as another user
            last[key] = f"{key}={Path(folder).expanduser().absolute()}"
    lines = ["# Written by anther device enroll: one key=value per line. You can edit it."]
    write(file, "\n".join([*lines, *(shlex.quote(word) for word in last.values())]).encode() + b"\n")
    return _next_steps(hello, name, has_data=any(word.startswith("data=") for word in last.values()))


def _next_steps(hello: ServerHello, name: str, *, has_data: bool) -> str:
    lines = [f"{name} has joined the federation. Its base model has {hello.base_bytes / 1e6:,.0f} MB. Next:"]
    if not has_data:
        lines.append(
            "    anther device run data=FOLDER     # the folder of your pictures; they never leave this device"
        )
    else:
        lines.append("    anther device run")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
