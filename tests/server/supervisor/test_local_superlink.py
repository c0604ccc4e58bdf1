"""Access to the SuperLink on loopback is limited to its own user."""

import contextlib
import os
import socket
import subprocess
import sys
import threading

import pytest

from bench.reliability.processes import free_port, wait_until
from common.flower import environment
from server.supervisor.local_superlink import OwnUserListener, owner

NOBODY = 65534
CLIENT = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10) as line:
    line.sendall(b"hello")
    try:
        sys.stdout.write(line.recv(100).decode())
    except OSError:
        pass
"""


def find_python() -> str | None:
    """Find a Python that another user may run: this one may be in a home folder that is closed to others."""
    for path in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if subprocess.run([path, "-c", ""], user=NOBODY, cwd="/", check=False).returncode == 0:
                return path
    return None


PYTHON = find_python() if os.geteuid() == 0 else None
needs_another_user = pytest.mark.skipif(PYTHON is None, reason="needs root, and a Python that others may run")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net/tcp")


@pytest.fixture
def port():
    """Port of a listener that greets each connection of its own user."""
    with OwnUserListener(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def greet():
            while True:
                try:
                    connection, _ = listener.accept()
                except ConnectionAbortedError:
                    continue
                except OSError:
                    return
                with connection:
                    connection.sendall(b"welcome")

        threading.Thread(target=greet, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def connect(port, python=sys.executable, **options):
    words = [python, "-c", CLIENT, str(port)]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options).stdout


@pytest.mark.integration
def test_own_user_connects(port):
    assert connect(port) == "welcome"


@pytest.mark.integration
@needs_another_user
def test_other_user_is_disconnected(port, capfd):
    for _ in range(3):
        assert connect(port, PYTHON, user=NOBODY, cwd="/") == ""
    assert connect(port) == "welcome"
    assert capfd.readouterr().err == f"closed a connection of user {NOBODY}\n", "logged once a minute"


GREET = """
import sys, urllib.request
print(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=10).status)
"""


@pytest.mark.integration
@needs_another_user
def test_superlink_answers_only_its_user(tmp_path):
    port = free_port()
    words = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "-P", "-m", "server.supervisor.local_superlink", *words],
            env=environment(tmp_path),
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
    try:

        def health(python=sys.executable, **options):
            words = [python, "-c", GREET, str(port)]
            return subprocess.run(words, capture_output=True, text=True, check=False, **options)

        wait_until(lambda: health().stdout == "200\n", 60, "a SuperLink")
        other = health(PYTHON, user=NOBODY, cwd="/")
        assert other.stdout == ""
        assert "refused" not in other.stderr.lower(), "it listens, and closes the connection"
        assert f"closed a connection of user {NOBODY}" in (tmp_path / "log").read_text()
        assert health().stdout == "200\n"
    finally:
        running.terminate()
        running.wait()


@pytest.mark.integration
def test_port_in_use_is_reported(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "server.supervisor.local_superlink", *words],
            env=environment(tmp_path),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert f"127.0.0.1:{port}: can't listen on this address" in done.stderr
    assert "choose another server.superlink_port" in done.stderr
    assert "Traceback" not in done.stderr


def test_owner_of_the_other_end():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as line:
        connection, peer = listener.accept()
        ours = listener.getsockname()
        with connection:
            with open("/proc/net/tcp") as table:  # noqa: PTH123
                assert owner(peer, ours, table.read()) == os.geteuid()
            line.close()  # the kernel lists a socket without owner as root's
            with open("/proc/net/tcp") as table:  # noqa: PTH123
                assert owner(peer, ours, table.read()) is None
    assert owner(("192.0.2.1", 5), ours, "header\n") is None
