"""Flower's SuperLink, restricted to its own user:  python -m server.supervisor.local_superlink ARGUMENTS

The arguments are those of `flower-superlink`.

Its APIs listen on a loopback port without passwords: a client of the control API starts runs, and a run is code.
Flower can't listen on a Unix socket, and a network namespace isn't available everywhere (containers, hardened kernels)
and would cut the ServerApp off the network. The kernel, however, lists the user of the other end of a loopback
connection: a connection of any user except this process's user and root is closed before a byte of it is read.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

UNGUARDED = "ANTHER_UNGUARDED"
"""Set to 1 to admit every local user, on systems that can't distinguish users."""

_TABLE = Path("/proc/net/tcp")  # connections of this network namespace
_ESTABLISHED, _NO_INODE = "01", "0"
_ROOT = 0
_QUIET = 60.0  # seconds between two lines of the log about one user
_GRACE = 3  # seconds that a stop waits for open connections: SuperExec keeps one open until it is stopped itself

Address = tuple[str, int]


def owner(peer: Address, ours: Address, table: str) -> int | None:
    """Return the user id of the process at the other end of a loopback connection.

    Args:
        peer: IPv4 address and port of the other end.
        ours: IPv4 address and port of this end.
        table: contents of /proc/net/tcp.

    Returns:
        The user id; None if the other end isn't on this machine, or has closed its socket and so has no user.
    """
    addresses = [_kernel_form(peer), _kernel_form(ours)]
    for line in table.splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == addresses and fields[3] == _ESTABLISHED and fields[9] != _NO_INODE:
            return int(fields[7])
    return None


class OwnUserListener(socket.socket):
    """A listening socket on loopback that closes connections of other users.

    Each user is logged at most once a minute. Otherwise repeated attempts would fill the disk with log lines.
    """

    def __init__(self, family: int, kind: int) -> None:
        super().__init__(family, kind)
        self._logged: dict[int | None, float] = {}  # when each user was last logged

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept one connection of this process's user, or of root.

        Raises:
            ConnectionAbortedError: the connection belonged to another user, and is closed. asyncio treats this as a
                client that disconnected.
        """
        connection, address = super().accept()
        user = owner(address, connection.getsockname(), _TABLE.read_text())
        if user is None or user not in (os.geteuid(), _ROOT):
            connection.close()
            self._log(user)
            raise ConnectionAbortedError("a connection of another user")
        return connection, address

    def _log(self, user: int | None) -> None:
        now = time.monotonic()
        if now - self._logged.get(user, -_QUIET) >= _QUIET:
            self._logged[user] = now
            print(f"closed a connection of user {'unknown' if user is None else user}", file=sys.stderr, flush=True)


def main() -> None:
    """Run Flower's command with `OwnUserListener` in place of its socket."""
    command: Any = importlib.import_module("flwr.superlink.cli.flower_superlink")
    command.uvicorn = SimpleNamespace(run=_serve)
    command.flower_superlink()


def _serve(*, app: Any, host: str, port: int, reload: bool, workers: int, **settings: Any) -> None:
    """Replace `uvicorn.run`."""
    del reload, workers
    import uvicorn

    with _listener() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            sys.exit(
                f"{host}:{port}: can't listen on this address ({error.strerror}): choose another server.superlink_port"
            )
        # uvloop, uvicorn's own choice, accepts connections without asking the socket's `accept`.
        ours = {"loop": "asyncio", "timeout_graceful_shutdown": _GRACE}
        uvicorn.Server(uvicorn.Config(app, **{**settings, **ours})).run(sockets=[listener])


def _listener() -> socket.socket:
    if _TABLE.exists():
        return OwnUserListener(socket.AF_INET, socket.SOCK_STREAM)
    if os.environ.get(UNGUARDED) == "1":
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sys.exit(
        f"{_TABLE} is missing, so local users can't be distinguished: to accept all of them, set "
        "server.trust_local_users=true"
    )


def _kernel_form(address: Address) -> str:
    """Format an IPv4 address and port as in the kernel's table."""
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{number:08X}:{address[1]:04X}"


if __name__ == "__main__":
    main()
