"""Take part in a federation with this device:  anther device run [key=value …]

Keeps the device connected, starts training when the server requests it, and restarts any of its processes that fails.
The server is contacted first: its version must match, and the base that it needs is downloaded if it is missing. Join
the federation once with `anther device enroll` before the first run.
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from client import paths
from client.runtime import server_connection
from client.runtime.child_processes import SuperNodeProcess, WorkerProcess, worker_socket
from client.runtime.server_connection import ServerConnection, ServerUnavailable
from common import processes
from common.errors import REPORTED_ERRORS, AntherError, describe_error
from common.file_lock import exclusive
from common.plugins import allow_plugins
from common.processes import end_with_parent
from common.service import SignalReceived, raise_on_sigterm, say
from conf.schemas.node import NodeConfig, compose
from models.files import assets
from privacy import policy

DONE, USAGE = 0, 2
_POLL_SECONDS = 0.5
_PAUSE, _MAX_PAUSE = 2.0, 30.0  # seconds before the server is contacted again


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status, USAGE with one line on standard error if the owner has to act."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in ("-h", "--help"):
        from conf.key_help import key_help

        print(__doc__, f"Keys (key=value), with their defaults\n\n{key_help(NodeConfig)}", sep="\n")
        return DONE
    raise_on_sigterm()
    try:
        run(compose(words, paths.config_file()))
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return USAGE
    except (SignalReceived, KeyboardInterrupt):
        pass
    return DONE


def run(node: NodeConfig) -> None:
    """Run the device's processes until a signal arrives; AntherError if the owner has to act first."""
    if node.connection.address is None:
        raise AntherError("not enrolled yet: run anther device enroll with a ticket from the server's operator")
    if node.data is None:
        raise AntherError("no pictures: set their folder by data=FOLDER")
    name = node.name or platform.node() or "device"
    files = paths.enrolled_files(name, node.store)
    node, owner_policy = replace(node, name=name, store=str(files.folder)), policy.load(files.folder / "policy.toml")
    check_pictures(node)
    check_meter(node)
    connection = ServerConnection(str(node.connection.address), insecure=node.connection.insecure)
    with exclusive(paths.keys_folder(), what="this device's part in its federation"), worker_socket() as listener:
        paths.remember(files)
        worker = WorkerProcess(listener, node)
        supernode = SuperNodeProcess(node, connection, listener.getsockname())
        try:
            while True:
                if not supernode.alive:
                    worker.base = wait_for_server(node, connection, owner_policy)
                    say(f"{name} takes part in the federation at {node.connection.address}, until it is stopped")
                    supernode.start()
                worker.poll(_POLL_SECONDS)
                supernode.poll()
        finally:
            supernode.stop()
            worker.stop()


def check_meter(node: NodeConfig) -> None:
    """Raise AntherError if `power.meter` names no meter that the owner allows."""
    if node.power.meter in ("auto", "none", "file"):
        return
    from client.power.meter import METERS  # rarely needed

    allow_plugins(node.allowed_plugins)
    if node.power.meter not in (known := METERS.names()):
        raise AntherError(
            f"power.meter={node.power.meter}: must be one of: auto, none, file, {', '.join(known)}; `plugins` lists "
            "the installed plug-ins that this device may load"
        )


def check_pictures(node: NodeConfig) -> None:
    """Raise AntherError if the owner's pictures can't be used, before connecting.

    The check runs in a separate process, so that its imports don't stay in memory.
    """
    options = [f"--background={node.background}", *([] if node.caption is None else [f"--caption={node.caption}"])]
    done = subprocess.run(
        processes.python("client.cli.check", "--quiet", *options, "--", str(node.data)),
        env=processes.environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=end_with_parent,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the pictures could not be checked"]
        raise AntherError(lines[-1].removeprefix("error: "))


def wait_for_server(node: NodeConfig, connection: ServerConnection, owner_policy: policy.Policy) -> str:
    """Wait for the server, and download its base if it is missing.

    Args:
        node: the device's configuration.
        connection: the connection to the server.
        owner_policy: the owner's policy.

    Returns:
        The base's content hash or path.

    Raises:
        AntherError: the owner's policy doesn't allow the server's base, or as in `ServerConnection.hello`.
    """
    pause = _PAUSE
    while True:
        try:
            hello = connection.hello()
            hello.check()
            if seconds := server_connection.skew(hello):
                raise ServerUnavailable(
                    f"this device's clock differs from the server's by {seconds:+.0f} s: set the clock, or enable NTP"
                )
            connection.check_in()
            if node.base is None and owner_policy.bases and hello.base not in owner_policy.bases:
                raise AntherError(
                    f"the federation's base is {hello.base}, which is not listed in `bases` of policy.toml: add it if "
                    "you trust it; nothing was downloaded"
                )
            if node.base is None:
                ensure_base(node, connection, hello.base)
            return node.base or hello.base
        except ServerUnavailable as error:
            say(f"{error}; next attempt in {pause:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)


def ensure_base(node: NodeConfig, connection: ServerConnection, base: str) -> None:
    """Download the base of this content hash if it is missing; ServerUnavailable if that isn't possible now.

    Args:
        node: the device's configuration.
        connection: the connection to the server.
        base: content hash of the base.
    """
    with contextlib.suppress(AntherError):
        assets.locate(base)
        return
    from client.power.sensors import choose_sensors
    from client.runtime.downloads import fetch  # rarely needed
    from client.runtime.http_source import http_get

    sensors = choose_sensors(node.power)
    say(f"downloading the base model {base[:12]}")

    def metered() -> bool:
        return bool(sensors.read().metered)

    try:
        with connection.client(signed=True) as client:
            fetch(base, node.fetch, http_get(client), metered=metered, progress=_Progress())
    except AntherError as error:
        # Interrupted, metered network or full disk: the downloaded part is kept for a later attempt.
        raise ServerUnavailable(str(error)) from error


class _Progress:
    """Print the progress of a download after each tenth."""

    def __init__(self) -> None:
        self._printed = 0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if (tenths := 10 * done_bytes // max(1, total_bytes)) > self._printed:
            self._printed = tenths
            say(f"{10 * tenths} % of {total_bytes / 1e6:,.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
