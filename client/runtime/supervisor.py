"""Take part in a federation with this device:  anther device run [key=value …]

Keeps the device connected, starts training when the server requests it, and restarts any of its processes that fails.
The server is contacted first: its version must match, and the base that it needs is downloaded if it is missing. Join
the federation once with `anther device enroll` before the first run.
"""

from __future__ import annotations

import contextlib
import os
import platform
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from client import paths
from client.runtime import server_connection
from client.runtime.server_connection import ServerConnection, ServerUnavailable
from common import low_memory, processes, strict_json
from common.atomic_files import make_folder
from common.errors import REPORTED_ERRORS, AntherError, describe_error
from common.file_lock import exclusive
from common.flower import environment
from common.processes import end_with_parent
from common.service import SignalReceived, raise_on_sigterm, say
from conf.schemas.node import NodeConfig, compose
from models.files import assets
from privacy import policy

DONE, USAGE = 0, 2
_POLL_SECONDS = 0.5
_STABLE_SECONDS = 60.0  # after which a start counts as successful
# Seconds before a restart: Flower considers a killed node connected until it has missed heartbeats for a minute, and
# refuses it until then.
_PAUSE, _MAX_PAUSE = 2.0, 30.0
_MAX_SOCKET_PATH = 100  # bytes; limit of the operating system


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
    """Take part until a signal arrives; AntherError if the owner has to do something first."""
    if node.connection.address is None:
        raise AntherError("not enrolled yet: run anther device enroll with a ticket from the server's operator")
    if node.data is None:
        raise AntherError("no pictures: name their folder with data=FOLDER")
    name = node.name or platform.node() or "device"
    files = paths.enrolled_files(name, node.store)
    node, owner_policy = replace(node, name=name, store=str(files.folder)), policy.load(files.folder / "policy.toml")
    check_pictures(node)
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


def check_pictures(node: NodeConfig) -> None:
    """Raise AntherError if the owner's pictures can't be used, before connecting.

    The check runs in a process of its own, so that its imports don't stay in memory.
    """
    done = subprocess.run(
        processes.python("client.cli.check", str(node.data)),
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
    """Wait for the server, and make sure that its base is on this device.

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
    """Print the progress of a download at every tenth."""

    def __init__(self) -> None:
        self._printed = 0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if (tenths := 10 * done_bytes // max(1, total_bytes)) > self._printed:
            self._printed = tenths
            say(f"{10 * tenths} % of {total_bytes / 1e6:,.0f} MB")


@dataclass
class WorkerProcess:
    """The process `client.runtime.worker`, which runs only while there are requests.

    Args:
        listener: requests arrive here. While the worker doesn't run, this object waits for them; while it runs, the
            worker does.
        node: the device's configuration, passed to the worker.
        base: content hash or path of the base that the worker loads.
    """

    listener: socket.socket
    node: NodeConfig
    base: str = ""
    _process: subprocess.Popen | None = None
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def __post_init__(self) -> None:
        self._selector.register(self.listener, selectors.EVENT_READ)

    def poll(self, seconds: float) -> None:
        """Start the worker if a request arrives within this many seconds; if it runs, wait for its end instead."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(seconds)
                if code:
                    say(f"the worker ended with status {code}")
                self._process = None
            return
        if self._selector.select(seconds):
            self._process = self._start()

    def _start(self) -> subprocess.Popen:
        settings, number = self.node.worker, self.listener.fileno()
        variables = {
            "ANTHER_LISTEN_FD": str(number),
            "ANTHER_NODE": strict_json.dumps(self.node),
            "ANTHER_BASE_HELD": self.base,
            **low_memory.ENVIRONMENT,
            **({} if settings.threads is None else {"OMP_NUM_THREADS": str(settings.threads)}),
        }

        def prepare() -> None:
            end_with_parent()
            os.nice(settings.nice)

        return subprocess.Popen(
            processes.python("client.runtime.worker"),
            env=processes.environment(variables),
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            preexec_fn=prepare,
        )

    def stop(self) -> None:
        """Terminate the process."""
        _end(self._process)


@dataclass
class SuperNodeProcess:
    """The process `client.runtime.supernode`, Flower's SuperNode, restarted after a pause whenever it ends."""

    node: NodeConfig
    server: ServerConnection
    socket_path: str
    _process: subprocess.Popen | None = None
    _started: float = 0.0
    _pause: float = _PAUSE

    @property
    def alive(self) -> bool:
        """Whether the process was started and has not been seen to end."""
        return self._process is not None

    def start(self) -> None:
        """Start the process."""
        folder = assets.home() / "flower"
        make_folder(folder)
        variables = {
            "ANTHER_WORKER": self.socket_path,
            "ANTHER_POLL_SECONDS": str(self.node.connection.poll_seconds),
            "ANTHER_SLOW_POLL_SECONDS": str(self.node.connection.max_poll_seconds),
        }
        credentials = ["--insecure"]
        if not self.server.insecure:
            credentials = [
                "--root-certificates",
                str(self.server.authority),
                "--auth-supernode-private-key",
                str(self.server.key),
            ]
        own_address = f"127.0.0.1:{_free_port()}"
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            processes.python(
                "client.runtime.supernode", own_address, "--", "--superlink", self.server.address, *credentials
            ),
            env={"FLWR_LOG_LEVEL": "WARNING", **environment(folder), **variables},
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )

    def poll(self) -> None:
        """If the process has ended, pause before it may be started again."""
        if self._process is None or (code := self._process.poll()) is None:
            return
        self._process = None
        was_stable = time.monotonic() - self._started > _STABLE_SECONDS
        self._pause = _PAUSE if was_stable else min(2 * self._pause, _MAX_PAUSE)
        say(f"the connection process ended with status {code}; it restarts in {self._pause:.0f} s")
        time.sleep(self._pause)

    def stop(self) -> None:
        """Terminate the process."""
        _end(self._process)


@contextlib.contextmanager
def worker_socket() -> Iterator[socket.socket]:
    """Open the worker's socket, which only this user can connect to."""
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="anther-", dir=folder) as temporary:  # 0700
        path = f"{temporary}/worker"
        if len(path.encode()) > _MAX_SOCKET_PATH:
            raise AntherError(f"{folder}: this path is too long for a socket: set XDG_RUNTIME_DIR to a shorter folder")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            Path(path).chmod(0o600)
            listener.listen(8)
            yield listener


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(process: subprocess.Popen | None) -> None:
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
