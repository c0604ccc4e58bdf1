"""A device's SuperNode, with a ClientApp process for each message; started by `anther device run`.

Flower's SuperNode exchanges the messages. It differs from Flower's own command in four ways:

- **No code from the server runs.** Flower installs the app bundle that comes with a run, and imports the ClientApp from
  it, so a server could read every picture. Here the ClientApp is the one installed on this device.
- ClientApps are forks of this process, which has imported their modules and has no other thread. A message takes
  milliseconds and a few MiB, where a new interpreter takes one or two seconds and 180 MiB. A ClientApp that is killed
  is replaced. Flower would wait for a minute, or forever if it was killed before it had its message.
- A node that was killed deactivates its old registration first when it starts again, instead of being refused for a
  minute. It waits until the server has noticed this and has dropped the messages that the node had pulled.
- A node that received a message recently polls twice a second, an idle node every few seconds. Flower's own node waits
  three seconds between two polls.

`_patch_polling`, `_skip_bundles`, `_deactivate_first` and `answer_task` replace parts of Flower by their names in the
versions that pyproject.toml allows.
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

from client.runtime.client_app import app
from common.atomic_files import write
from common.processes import end_with_parent

POLL, IDLE_POLL = "ANTHER_POLL_SECONDS", "ANTHER_SLOW_POLL_SECONDS"
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_FLOWER_IDLE = 3.0  # seconds that Flower's SuperNode sleeps without a message
_ABSENCE = 6.0  # seconds; a server polls for replies every 3, and may be busy
_ACTIVE_SECONDS = 60.0  # seconds of fast polling after a message
_UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


class _PollClock:
    """Replacement of the `time` module in the loop of Flower's SuperNode."""

    def __init__(self, quick: float, slow: float) -> None:
        self._quick, self._slow, self._last = quick, slow, time.monotonic()

    def sleep(self, seconds: float) -> None:
        if seconds < _FLOWER_IDLE:  # waiting for the ClientApp's reply, or an object of it
            time.sleep(min(seconds, 0.1))
            return
        quiet = time.monotonic() - self._last - _ACTIVE_SECONDS
        time.sleep(self._quick if quiet < 0 else min(self._slow, self._quick + quiet / _ACTIVE_SECONDS))

    def message_received(self) -> None:
        self._last = time.monotonic()


def main() -> None:
    """Run as `python -m client.runtime.supernode OWN_ADDRESS -- FLOWER_SUPERNODE_ARGUMENTS`."""
    own_address, _, *arguments = sys.argv[1:]
    host, _, port = own_address.rpartition(":")
    secret = secrets.token_bytes(32)  # protects this node's tasks from other users of this machine
    file = Path(os.environ["FLWR_HOME"]) / "tasks.secret"
    write(file, secret)
    arguments += ["--superexec-auth-secret-file", str(file)]
    receiver, sender = os.pipe()
    if (node := os.fork()) == 0:
        os.close(receiver)
        end_with_parent()
        _patch_polling(sender)
        _skip_bundles()
        _deactivate_first(Path(os.environ["FLWR_HOME"]) / "node")
        sys.argv = ["flower-supernode", "--isolation", "process", "--host", host, "--port", port, *arguments]
        flower_supernode()
        os._exit(0)
    os.close(sender)
    # On SIGTERM the SuperNode deactivates itself at the server, then ends.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(node, signal.SIGTERM))
    signal.signal(signal.SIGINT, lambda *_: os.kill(node, signal.SIGTERM))
    sys.exit(_serve(node, receiver, own_address, secret))


def _patch_polling(sender: int) -> None:
    """Make Flower's loop poll at our intervals, and report each pulled message through a pipe."""
    pace = _PollClock(float(os.environ.get(POLL, "0.5")), float(os.environ.get(IDLE_POLL, "5")))
    original = supernode._pull_and_store_message

    def pull_and_report(*, state: Any, **arguments: Any) -> int | None:
        # Earlier tasks may belong to a ClientApp that is ending.
        earlier = {task.task_id for task in state.get_tasks(statuses=_UNFINISHED)}
        run_id = original(state=state, **arguments)
        if run_id is not None:
            pace.message_received()
            os.write(sender, b".")
            return run_id
        # If a message arrives incompletely, because its run or the server ended, Flower leaves its task behind. The
        # task can't be answered, and an attempt would block.
        for task in state.get_tasks(statuses=_UNFINISHED):
            if task.task_id not in earlier:
                state.finish_task(task.task_id, sub_status=SubStatus.FAILED, details="its message never arrived")
        return None

    supernode._pull_and_store_message = pull_and_report  # type: ignore[assignment] # takes keyword arguments only
    supernode.time = SimpleNamespace(sleep=pace.sleep)  # type: ignore[assignment]


def _skip_bundles() -> None:
    """Keep Flower from opening app bundles, which it would unpack for a configuration that isn't used here."""
    supernode.get_fused_config_from_fab = lambda *_: {}


def _deactivate_first(file: Path) -> None:
    """Deactivate a killed node's old registration when it is started again.

    Otherwise Flower considers it connected, and refuses it, until it has missed heartbeats for a minute. Messages that
    it had pulled can't be answered any more. While a node is deactivated, Flower reports that it won't reply, so the
    round doesn't wait.
    """
    original = supernode.http_request_response

    @contextmanager
    def connect_again(
        address: str, insecure: bool, roots: Any, keys: Any, tries: int | None, wait: float | None
    ) -> Iterator[Any]:
        if keys is not None and file.exists():
            with contextlib.suppress(Exception):  # unknown to the server, or the server is down: Flower reports that
                _deactivate(address, insecure, roots, keys, int(file.read_text()))
                time.sleep(_ABSENCE)
        with original(address, insecure, roots, keys, tries, wait) as connection:
            write(file, str(connection[0]).encode())
            yield connection
        file.unlink(missing_ok=True)

    supernode.http_request_response = connect_again  # type: ignore[assignment] # of looser types


def _deactivate(address: str, insecure: bool, roots: Any, keys: Any, node: int) -> None:
    with FleetHttpClient.from_server_address(
        address,
        insecure,
        roots,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*keys)],
    ) as client:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))


class _Task(NamedTuple):
    """A message to answer, and the number of attempts left."""

    token: str
    pulled: tuple[Any, ...]
    """The input that Flower's ClientApp process would pull itself. It is pulled before the fork, so that it isn't lost
    if the ClientApp is killed, and Flower doesn't wait for a reply that never comes.
    """
    tries: int = 3


def _serve(node: int, receiver: int, address: str, secret: bytes) -> int:
    """Start a ClientApp for each task of the SuperNode; return the SuperNode's exit status when it ends.

    Args:
        node: process id of the SuperNode.
        receiver: pipe that receives a byte for each pulled message, and is closed when the SuperNode ends.
        address: address of the SuperNode's own API.
        secret: authenticates this process there.
    """
    client = _client(
        address, "SuperExec", SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE})
    )
    apps: dict[int, _Task] = {}
    while True:
        readable, _, _ = select.select([receiver], [], [], 0.5 if apps else None)
        if readable and not os.read(receiver, 4096):
            break  # the SuperNode has ended
        for child in list(apps):
            ended, status = os.waitpid(child, os.WNOHANG)
            task = apps.pop(child) if ended else None
            if task and os.WIFSIGNALED(status) and task.tries > 1:
                print(
                    f"a ClientApp was killed by signal {os.WTERMSIG(status)}; its message is processed again",
                    flush=True,
                )
                apps[_fork_client_app(address, task)] = task._replace(tries=task.tries - 1)
        if not readable:
            continue
        try:
            response = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            if response.HasField("task") and response.token:
                with contextlib.closing(
                    _client(address, "flwr-clientapp", RuntimeTokenHttpInterceptor(response.token))
                ) as task_client:
                    task = _Task(response.token, clientapp.pull_task_input(task_client))
                apps[_fork_client_app(address, task)] = task
        except Exception as error:  # the SuperNode waits for an answer that won't come: restart it
            print(f"a message could not be received from the SuperNode: {error}", flush=True)
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


def _fork_client_app(address: str, task: _Task) -> int:
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
    """Run Flower's ClientApp procedure with this device's code in place of the server's."""
    clientapp.pull_task_input = lambda _: task.pulled  # type: ignore[assignment]
    clientapp.install_from_fab = lambda *_, **__: None  # type: ignore[assignment]
    clientapp.get_project_dir = lambda *_, **__: None  # type: ignore[assignment]
    clientapp.get_load_client_app_fn = lambda **_: lambda *_: app
    clientapp.run_clientapp(runtime_api_address=address, token=task.token, insecure=True, parent_pid=None)


if __name__ == "__main__":
    main()
