"""Take part with this device:  python -m client.enroll TICKET [data=FOLDER] [name=NAME] [key=value …]

The ticket is what the federation's operator gave you; it works once. What else is said here, any key of a device's
configuration (conf/node.py), is kept in ANTHER_HOME/node.conf, for `python -m client.run`.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence

from client import home, link
from conf.errors import TOLD, told
from conf.node import compose, enrolled
from privacy.durable import write
from protocol import ticket as tickets
from protocol.hello import Hello

DONE, USAGE = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: USAGE with one line on standard error where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m client.enroll", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ticket")
    parser.add_argument("words", nargs="*", metavar="key=value")
    asked = parser.parse_args(arguments)
    try:
        print(enroll(asked.ticket, asked.words))
    except TOLD as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return USAGE
    return DONE


def enroll(text: str, words: Sequence[str]) -> str:
    """Come in with a ticket, and keep what was said; in words what comes next."""
    ticket, file = tickets.read(text), home.words()
    node = compose(words, file)
    name = node.name or platform.node() or "device"
    found, hello = link.enrol(ticket, name)
    said = [*enrolled(file), *words, f"name={name}", f"link.address={found.address}", "link.insecure=false"]
    said.append(f"federation={hello.federation}")
    last = {word.partition("=")[0]: word for word in said}
    lines = ["# Written by python -m client.enroll; a key=value a line, to be changed by hand as you like."]
    write(file, "\n".join([*lines, *(shlex.quote(word) for word in last.values())]).encode() + b"\n")
    return _next(hello, name, has_data=any(word.startswith("data=") for word in last.values()))


def _next(hello: Hello, name: str, *, has_data: bool) -> str:
    lines = [f"{name} takes part now, with a base of {hello.base_bytes / 1e6:,.0f} MB. Next:"]
    if not has_data:
        lines.append("    python -m client.run data=FOLDER     # of your pictures, which never leave it")
    else:
        lines.append("    python -m client.run")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
