"""This device's part in its federation:  anther device run [key=value …]

It keeps a SuperNode connected, starts the worker when there is something to do, and starts again whatever dies. What
there is to be known of the server is asked first: whether both speak alike, and which base is needed; a base that is
missing is fetched. `anther device enroll` comes before, once.
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

from client.cli import paths
from client.runtime import server_connection as links
from client.runtime.server_connection import ServerConnection, ServerUnavailable
from common import low_memory, processes, strict_json
from common.atomic_files import make_folder
from common.errors import REPORTED_ERRORS, AntherError, told
from common.file_lock import exclusive
from common.flower import environment
from common.processes import end_with_parent
from common.service import SignalReceived, raise_on_sigterm, say
from conf.schemas.node import NodeConfig, compose
from models.base import assets
from privacy import policy

DONE, USAGE = 0, 2
_LOOK = 0.5  # seconds
_STEADY = 60.0  # seconds after which a process counts as having started well
_PAUSE, _LONGEST = 2.0, 30.0  # seconds before what ended is started again: Flower takes a node that was killed for
# connected until it has missed heartbeats for a minute, and refuses it until then
_SOCKET_PATH = 100  # bytes that the path of a socket may have


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: USAGE with one line on standard error where its owner has to do something."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in ("-h", "--help"):
        print(__doc__, "Keys, their units and limits: conf/schemas/node.py.", sep="\n")
        return DONE
    raise_on_sigterm()
    try:
        run(compose(words, paths.words()))
    except REPORTED_ERRORS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return USAGE
    except (SignalReceived, KeyboardInterrupt):
        pass
    return DONE


def run(node: NodeConfig) -> None:
    """Take part until a signal comes; AntherError if its owner has to do something first."""
    if node.connection.address is None:
        raise AntherError("not enrolled yet: anther device enroll, with a ticket of the server's operator")
    if node.data is None:
        raise AntherError("data: say which folder holds your pictures, data=FOLDER")
    name = node.name or platform.node() or "device"
    files = paths.own(name, node.store)
    node, owners = replace(node, name=name, store=str(files.folder)), policy.load(files.folder / "policy.toml")
    check_pictures(node)
    link = ServerConnection(str(node.connection.address), insecure=node.connection.insecure)
    with exclusive(paths.link(), what="this device's part in its federation"), listening() as listener:
        paths.remember(files)
        worker = WorkerProcess(listener, node)
        supernode = SuperNode(node, link, listener.getsockname())
        try:
            while True:
                if not supernode.alive:
                    worker.base = ready(node, link, owners)
                    say(f"{name} takes part in the federation at {node.connection.address}, until it is stopped")
                    supernode.start()
                worker.look(_LOOK)
                supernode.look()
        finally:
            supernode.stop()
            worker.stop()


def check_pictures(node: NodeConfig) -> None:
    """Raises AntherError with what is wrong with its owner's pictures, before anything is taken part in.

    A process of its own looks at them: what it needs for that is not to stay in memory.
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
        lines = done.stderr.strip().splitlines() or ["they could not be looked at"]
        raise AntherError(lines[-1].removeprefix("error: "))


def ready(node: NodeConfig, link: ServerConnection, owners: policy.Policy) -> str:
    """Wait for the server, and have the base; its content hash or path.

    Raises:
        AntherError: the server's base isn't among those that the owner allows, or as `ServerConnection.hello`.
    """
    pause = _PAUSE
    while True:
        try:
            hello = link.hello()
            hello.check()
            if apart := links.skew(hello):
                raise ServerUnavailable(f"this device's clock is {apart:+.0f} s off the server's: set it, or start NTP")
            link.check_in()
            if node.base is None and owners.bases and hello.base not in owners.bases:
                raise AntherError(
                    f"the federation's base is {hello.base}, which is not among `bases` of policy.toml: add it if you "
                    "trust it; nothing was fetched"
                )
            if node.base is None:
                have(node, link, hello.base)
            return node.base or hello.base
        except ServerUnavailable as error:
            say(f"{error}; again in {pause:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)


def have(node: NodeConfig, link: ServerConnection, base: str) -> None:
    """Have the base of this content hash here, from wherever it is to be had; Unreachable if it isn't to be had now."""
    with contextlib.suppress(AntherError):
        assets.locate(base)
        return
    from client.power.sensors import choose_sensors
    from client.runtime.downloads import fetch  # rarely needed
    from client.runtime.http_source import http_get

    sensors = choose_sensors(node.power)
    say(f"fetching the base {base[:12]}")

    def metered() -> bool:
        return bool(sensors.read().metered)

    try:
        with link.client(signed=True) as client:
            fetch(base, node.fetch, http_get(client), metered=metered, progress=_Progress())
    except AntherError as error:  # a cut link, a paid network, a full disk: what came is kept, and later it may go on
        raise ServerUnavailable(str(error)) from error


class _Progress:
    """Says how far a fetch is, at every tenth."""

    def __init__(self) -> None:
        self._told = 0

    def __call__(self, done: int, total: int) -> None:
        if (tenths := 10 * done // max(1, total)) > self._told:
            self._told = tenths
            say(f"{10 * tenths} % of {total / 1e6:,.0f} MB")


@dataclass
class WorkerProcess:
    """`client.runtime.worker`, which is there while it has something to do.

    Args:
        listener: it waits for requests here while the worker isn't there, and the worker does while it is.
    """

    listener: socket.socket
    node: NodeConfig
    base: str = ""
    _process: subprocess.Popen | None = None
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def __post_init__(self) -> None:
        self._selector.register(self.listener, selectors.EVENT_READ)

    def look(self, seconds: float) -> None:
        """Start it if somebody asks within so many seconds."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(seconds)
                if code:
                    say(f"the worker ended with {code}")
                self._process = None
            return
        if self._selector.select(seconds):
            self._process = self._start()

    def _start(self) -> subprocess.Popen:
        settings, number = self.node.worker, self.listener.fileno()
        own = {
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
            env=processes.environment(own),
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            preexec_fn=prepare,
        )

    def stop(self) -> None:
        _end(self._process)


@dataclass
class SuperNode:
    """`client.runtime.supernode`: Flower's SuperNode, started again with a pause whenever it ends."""

    node: NodeConfig
    link: ServerConnection
    socket_path: str
    _process: subprocess.Popen | None = None
    _started: float = 0.0
    _pause: float = _PAUSE

    @property
    def alive(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        folder = assets.home() / "flower"
        make_folder(folder)
        own = {
            "ANTHER_WORKER": self.socket_path,
            "ANTHER_POLL_SECONDS": str(self.node.connection.poll_seconds),
            "ANTHER_SLOW_POLL_SECONDS": str(self.node.connection.max_poll_seconds),
        }
        safe = ["--insecure"]
        if not self.link.insecure:
            safe = [
                "--root-certificates",
                str(self.link.authority),
                "--auth-supernode-private-key",
                str(self.link.key),
            ]
        own_address = f"127.0.0.1:{_free_port()}"
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            processes.python("client.runtime.supernode", own_address, "--", "--superlink", self.link.address, *safe),
            env={"FLWR_LOG_LEVEL": "WARNING", **environment(folder), **own},
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )

    def look(self) -> None:
        """If it has ended, wait, so that it may be started again."""
        if self._process is None or (code := self._process.poll()) is None:
            return
        self._process = None
        steady = time.monotonic() - self._started > _STEADY
        self._pause = _PAUSE if steady else min(2 * self._pause, _LONGEST)
        say(f"the SuperNode ended with {code}; again in {self._pause:.0f} s")
        time.sleep(self._pause)

    def stop(self) -> None:
        _end(self._process)


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    """A socket that only this user reaches."""
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="anther-", dir=folder) as own:  # 0700
        path = f"{own}/worker"
        if len(path.encode()) > _SOCKET_PATH:
            raise AntherError(f"{folder}: too long for a socket's path: set XDG_RUNTIME_DIR to a shorter one")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            Path(path).chmod(0o600)
            listener.listen(8)
            yield listener


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


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
