"""Child processes of the supervisor: the worker, which runs only while requests arrive, and the SuperNode."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from client.runtime.server_connection import ServerConnection
from common import low_memory, processes, strict_json
from common.atomic_files import make_folder
from common.errors import AntherError
from common.flower import environment
from common.processes import end_with_parent
from common.service import say
from conf.schemas.node import NodeConfig
from models.files import assets

_STABLE_SECONDS = 60.0  # a process that runs this long has started successfully
# Seconds before a restart: Flower considers a killed node connected until it has missed heartbeats for a minute, and
# refuses it until then.
_PAUSE, _MAX_PAUSE = 2.0, 30.0
_MAX_SOCKET_PATH = 100  # bytes; limit of the operating system


@dataclass
class WorkerProcess:
    """Manager of the process `client.runtime.worker`, which runs only while requests arrive.

    Args:
        listener: socket of the requests. This object waits on it until the worker starts; then the worker reads it.
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
    """Manager of the process `client.runtime.supernode`, Flower's SuperNode; it restarts after a pause when it ends."""

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
