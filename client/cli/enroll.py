"""Take part with this device:  anther device enroll [--ticket-file FILE] [data=FOLDER] [name=NAME] [key=value …]

The ticket is what the federation's operator gave you; it works once. It is asked for, or read from a file or standard
input: what is on a command line, every user of this machine can read. What else is said here, any key of a device's
configuration (conf/schemas/node.py), is kept in ANTHER_HOME/node.conf, for `anther device run`.
"""

from __future__ import annotations

import argparse
import getpass
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from client.cli import paths
from client.runtime import server_connection
from common.atomic_files import write
from common.errors import AntherError, refused
from conf.schemas.node import compose, read_enrollment
from protocol import ticket as tickets
from protocol.handshake import ServerHello

DONE, USAGE = 0, 2
_LONGEST = 4096  # characters of what a ticket is read from
_SCHEME = "anther://"


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: USAGE with one line on standard error where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="anther device enroll", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ticket-file", metavar="FILE", help="that the ticket is in; -: standard input (default: it is asked for)"
    )
    parser.add_argument("words", nargs="*", metavar="key=value")
    asked = parser.parse_args(arguments)
    try:
        if any(word.startswith(_SCHEME) for word in asked.words):
            raise AntherError(
                "a ticket on the command line can be read by every user of this machine, and stays in the shell's "
                "history: leave it out, and paste it when it is asked for; or --ticket-file FILE"
            )
        checked = _checked(asked.words)
        print(enroll(ticket_text(asked.ticket_file), checked))
    except AntherError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except (EOFError, KeyboardInterrupt):
        print("error: no ticket was given", file=sys.stderr)
        return USAGE
    return DONE


def _checked(words: Sequence[str]) -> Sequence[str]:
    """The words, once nothing is wrong with them nor with the pictures: the ticket, which works once, comes after.

    Raises AntherError otherwise.
    """
    node = compose(words, paths.words())
    if node.data is not None:
        from client.data import load_folder  # torch

        load_folder(node.data)
    return words


def ticket_text(file: str | None) -> str:
    """The ticket as it was written: in a file, on standard input, or at the terminal without being shown."""
    try:
        if file not in (None, "-"):
            with Path(str(file)).expanduser().open(encoding="utf-8") as content:
                return content.read(_LONGEST)
        if file is None and sys.stdin.isatty():
            return getpass.getpass("Ticket (it isn't shown): ")
        return sys.stdin.readline(_LONGEST)
    except OSError as error:
        raise refused(error, file) from error
    except UnicodeDecodeError as error:
        raise AntherError(f"{file or 'standard input'}: not a text, so no ticket") from error


def enroll(text: str, words: Sequence[str]) -> str:
    """Come in with a ticket, and keep what was said; in words what comes next."""
    ticket, file = tickets.parse(text), paths.words()
    node = compose(words, file)
    name = node.name or platform.node() or "device"
    found, hello = server_connection.enroll(ticket, name)
    said = [
        *read_enrollment(file),
        *words,
        f"name={name}",
        f"connection.address={found.address}",
        "connection.insecure=false",
    ]
    said.append(f"federation={hello.federation}")
    last = {word.partition("=")[0]: word for word in said}
    lines = ["# Written by anther device enroll; a key=value a line, to be changed by hand as you like."]
    write(file, "\n".join([*lines, *(shlex.quote(word) for word in last.values())]).encode() + b"\n")
    return _next(hello, name, has_data=any(word.startswith("data=") for word in last.values()))


def _next(hello: ServerHello, name: str, *, has_data: bool) -> str:
    lines = [f"{name} takes part now, with a base of {hello.base_bytes / 1e6:,.0f} MB. Next:"]
    if not has_data:
        lines.append("    anther device run data=FOLDER     # of your pictures, which never leave it")
    else:
        lines.append("    anther device run")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
