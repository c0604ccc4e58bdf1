"""A network on this machine: a bridge, and a namespace for each device whose link can be taken down."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SERVER = "10.213.0.1"
_BRIDGE = "anther0"


@contextmanager
def network(names: Sequence[str]) -> Iterator[dict[str, list[str]]]:
    """Create the network, and yield for each name the command prefix that runs in its namespace.

    Requires root. The server's address is SERVER.
    """
    _end(names)
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{SERVER}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        for number, name in enumerate(names):
            _ip("netns", "add", _space(name))
            _ip("link", "add", cable(name), "type", "veth", "peer", "name", "eth0", "netns", _space(name))
            _ip("link", "set", cable(name), "master", _BRIDGE, "up")
            inside = ("netns", "exec", _space(name), "ip")
            _ip(*inside, "addr", "add", f"10.213.0.{10 + number}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield {name: ["ip", "netns", "exec", _space(name)] for name in names}
    finally:
        _end(names)


def set_link(name: str, *, on: bool) -> None:
    """Take the link of a device up or down."""
    _ip("link", "set", cable(name), "up" if on else "down")


def cable(name: str) -> str:
    """Return the name of a device's link on the server's side."""
    return f"an-{name[-10:]}"  # interface names have at most 15 characters


def _space(name: str) -> str:
    return f"anther-{name}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _end(names: Sequence[str]) -> None:
    cables = (("link", "del", cable(name)) for name in names)
    for arguments in (*cables, *(("netns", "del", _space(name)) for name in names), ("link", "del", _BRIDGE)):
        subprocess.run(["ip", *arguments], check=False, stderr=subprocess.DEVNULL)
