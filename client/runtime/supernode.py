"""A device's SuperNode, and its ClientApp for each message:  started by `anther device run`.

Flower's SuperNode carries the messages. Four things are other than its own command has them:

- **No code that a server sends is run.** Flower installs the app bundle that comes with a run, and imports the
  ClientApp from it: then a server could read any picture. Here the ClientApp is this device's own installed one.
- ClientApps are forks of this process, which has imported all that they need and holds no thread: milliseconds and a
  few MiB for each message, where a new interpreter takes a second or two and 180 MiB. One that is killed is followed by
  another; Flower would wait for a minute, or, where it was killed before it had its message, for ever.
- A node that was killed says goodbye first when it starts again, in place of being refused for a minute; and stays
  away until its server has seen that, and has given up what the node had pulled.
- A node at work looks for messages twice a second, one that has had none for long every few seconds; Flower's own
  waits three seconds between two.

What of Flower is replaced for it is in `_pace`, `_leave_bundles_packed`, `_remember` and `answer_task`, by the names
that it has in the versions of pyproject.toml.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import flwr.supernode.runtime.run_clientapp as clientapp
import flwr.supernode.start_client_internal as supernode
from flwr.common.constant import Status, SubStatus
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.app import app
from common.atomic_files import write
from common.processes import end_with_parent

POLL, SLOW = "ANTHER_POLL_SECONDS", "ANTHER_SLOW_POLL_SECONDS"
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_IDLE = 3.0  # seconds that Flower's SuperNode sleeps when there was no message
_AWAY = 6.0  # seconds; a server looks for replies every 3, and may be busy
_QUICK = 60.0  # seconds after a message in which the next is looked for quickly
_UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


class _Pace:
    """Stands for the `time` module in Flower's loop of a SuperNode."""

    def __init__(self, quick: float, slow: float) -> None:
        self._quick, self._slow, self._last = quick, slow, time.monotonic()

    def sleep(self, seconds: float) -> None:
        if seconds < _IDLE:  # for the ClientApp's reply, or an object of it
            time.sleep(min(seconds, 0.1))
            return
        quiet = time.monotonic() - self._last - _QUICK
        time.sleep(self._quick if quiet < 0 else min(self._slow, self._quick + quiet / _QUICK))

    def came(self) -> None:
        self._last = time.monotonic()


def main() -> None:
    """Run as `python -m client.runtime.supernode ADDRESS-OF-ITS-OWN -- ARGUMENTS-OF-flower-supernode`."""
    own, _, *arguments = sys.argv[1:]
    host, _, port = own.rpartition(":")
    secret = secrets.token_bytes(32)  # of this node's tasks: other users of this machine have no business with them
    file = Path(os.environ["FLWR_HOME"]) / "tasks.secret"
    write(file, secret)
    arguments += ["--superexec-auth-secret-file", str(file)]
    noted, note = os.pipe()
    if (node := os.fork()) == 0:
        os.close(noted)
        end_with_parent()
        _pace(note)
        _leave_bundles_packed()
        _remember(Path(os.environ["FLWR_HOME"]) / "node")
        sys.argv = ["flower-supernode", "--isolation", "process", "--host", host, "--port", port, *arguments]
        flower_supernode()
        os._exit(0)
    os.close(note)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(node, signal.SIGTERM))  # it says goodbye to the server, then ends
    signal.signal(signal.SIGINT, lambda *_: os.kill(node, signal.SIGTERM))
    sys.exit(_serve(node, noted, own, secret))


def _pace(note: int) -> None:
    """Have Flower's loop keep our pace, and note what it pulls."""
    pace = _Pace(float(os.environ.get(POLL, "0.5")), float(os.environ.get(SLOW, "5")))
    pull = supernode._pull_and_store_message

    def noting(*, state: Any, **named: Any) -> int | None:
        before = {task.task_id for task in state.get_tasks(statuses=_UNFINISHED)}  # of a ClientApp that is ending
        found = pull(state=state, **named)
        if found is not None:
            pace.came()
            os.write(note, b".")
            return found
        # Of a message that came in part, as its run or the server ended, Flower leaves the task behind: nobody could
        # ever answer it, and whoever tried would wait.
        for task in state.get_tasks(statuses=_UNFINISHED):
            if task.task_id not in before:
                state.finish_task(task.task_id, sub_status=SubStatus.FAILED, details="its message never came")
        return None

    supernode._pull_and_store_message = noting  # type: ignore[assignment] # by names alone
    supernode.time = SimpleNamespace(sleep=pace.sleep)  # type: ignore[assignment]


def _leave_bundles_packed() -> None:
    """Have no app bundle opened: Flower unpacks a file of it whole, for a configuration that nobody here reads."""
    supernode.get_fused_config_from_fab = lambda *_: {}


def _remember(file: Path) -> None:
    """Have a node that was killed say goodbye when it is started again.

    Else Flower takes it for connected, and refuses it, until it has missed heartbeats for a minute. What it had pulled,
    it can't answer any more: to whoever asks for a reply while a node is away, Flower says that none will come, and
    the round need not wait for it.
    """
    connect = supernode.http_request_response

    @contextmanager
    def remembering(
        address: str, insecure: bool, roots: Any, keys: Any, tries: int | None, wait: float | None
    ) -> Iterator[Any]:
        if keys is not None and file.exists():
            with contextlib.suppress(Exception):  # it may be forgotten there, or the server away: Flower then says so
                _say_goodbye(address, insecure, roots, keys, int(file.read_text()))
                time.sleep(_AWAY)
        with connect(address, insecure, roots, keys, tries, wait) as found:
            write(file, str(found[0]).encode())
            yield found
        file.unlink(missing_ok=True)

    supernode.http_request_response = remembering  # type: ignore[assignment] # of looser types


def _say_goodbye(address: str, insecure: bool, roots: Any, keys: Any, node: int) -> None:
    with FleetHttpClient.from_server_address(
        address,
        insecure,
        roots,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*keys)],
    ) as client:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))


class _Task(NamedTuple):
    """A message that is to be answered, and how often that may still be tried."""

    token: str
    pulled: tuple[Any, ...]
    """What Flower's ClientApp process would pull for itself: here it is there before the fork, so that it isn't lost
    with a ClientApp that is killed, and Flower waits for no reply that never comes."""
    tries: int = 3


def _serve(node: int, noted: int, address: str, secret: bytes) -> int:
    """Start a ClientApp for each task of the SuperNode; its exit status when it ends."""
    client = _client(
        address, "SuperExec", SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE})
    )
    apps: dict[int, _Task] = {}
    while True:
        ready, _, _ = select.select([noted], [], [], 0.5 if apps else None)
        if ready and not os.read(noted, 4096):
            break  # the SuperNode is gone
        for child in list(apps):
            ended, status = os.waitpid(child, os.WNOHANG)
            task = apps.pop(child) if ended else None
            if task and os.WIFSIGNALED(status) and task.tries > 1:
                print(
                    f"a ClientApp was ended by signal {os.WTERMSIG(status)}; its message is answered anew", flush=True
                )
                apps[_in_a_fork(address, task)] = task._replace(tries=task.tries - 1)
        if not ready:
            continue
        try:
            found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            if found.HasField("task") and found.token:
                with contextlib.closing(
                    _client(address, "flwr-clientapp", RuntimeTokenHttpInterceptor(found.token))
                ) as own:
                    task = _Task(found.token, clientapp.pull_task_input(own))
                apps[_in_a_fork(address, task)] = task
        except Exception as error:  # the SuperNode waits for an answer that won't come: begin again
            print(f"a message could not be taken from the SuperNode: {error}", flush=True)
            os.kill(node, signal.SIGTERM)
    for child in apps:
        os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(node, 0)[1])


def _client(address: str, name: str, own: Any) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=name), own],
    )


def _in_a_fork(address: str, task: _Task) -> int:
    if child := os.fork():
        return child
    status = 1
    try:
        end_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        answer_task(address, task)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0) if isinstance(end.code, int) else 1
    finally:
        os._exit(status)


def answer_task(address: str, task: _Task) -> None:
    """Flower's own course of a ClientApp, with this device's code in place of the server's."""
    clientapp.pull_task_input = lambda _: task.pulled  # type: ignore[assignment]
    clientapp.install_from_fab = lambda *_, **__: None  # type: ignore[assignment]
    clientapp.get_project_dir = lambda *_, **__: None  # type: ignore[assignment]
    clientapp.get_load_client_app_fn = lambda **_: lambda *_: app
    clientapp.run_clientapp(runtime_api_address=address, token=task.token, insecure=True, parent_pid=None)


if __name__ == "__main__":
    main()
