"""Flower's SuperLink as a child process, and the Flower commands for it.

It listens on loopback, for its own user only (`server.supervisor.local_superlink`): its control API, which starts runs
and registers nodes, has no passwords. Devices can only make the calls that `server.gateway` forwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common.atomic_files import write
from common.errors import AntherError
from common.flower import environment
from common.processes import end_with_parent, python
from server.gateway.pki import Certificates
from server.supervisor import database
from server.supervisor.control import ControlClient
from server.supervisor.local_superlink import UNGUARDED

LOOPBACK = "127.0.0.1"
SERVER_FOLDER = "ANTHER_SERVER"
"""Environment variable with the server's folder, for the ServerApp."""

_LARGEST = "largest"  # file in a server's folder
_ADAPTER = 64 << 20  # bytes of the largest adapter, until a ServerApp has stored the size

_MAX_LOG = 64 << 20  # bytes of a log file above which the next start begins a new one

_READY = 60.0  # seconds for the start


@dataclass
class SuperLinkProcess:
    """One SuperLink process, with its database in `folder`.

    Args:
        certificates: None: without TLS, and then without authentication of nodes.
        unguarded: whether other local users may connect, if the system can't tell users apart.
    """

    folder: Path
    port: int
    certificates: Certificates | None
    unguarded: bool = False
    _process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def home(self) -> Path:
        """FLWR_HOME of the process."""
        return self.folder / "flower"

    @property
    def _log(self) -> Path:
        return self.folder / "superlink.log"

    @property
    def _database(self) -> Path:
        return self.folder / "superlink.db"

    def stored_bytes(self) -> int:
        """Return the size of the database on disk, in bytes."""
        return database.size(self._database)

    def start(self) -> None:
        """Start the process, and return when it answers requests.

        Raises:
            AntherError: it doesn't answer in time.
        """
        self._write_flower_config()
        database.prepare(self._database)
        variables = {SERVER_FOLDER: str(self.folder), **({UNGUARDED: "1"} if self.unguarded else {})}
        if self._log.exists() and self._log.stat().st_size > _MAX_LOG:
            self._log.replace(self._log.with_suffix(".log.1"))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                python(
                    "server.supervisor.local_superlink",
                    "--host",
                    LOOPBACK,
                    "--port",
                    str(self.port),
                    "--database",
                    str(self._database),
                    "--disable-runtime-dependency-installation",
                    *self._tls(),
                ),
                env=environment(self.home) | variables,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=end_with_parent,
            )
        until = time.monotonic() + _READY
        while not self._is_healthy():
            if not self.alive or time.monotonic() > until:
                self.stop()
                raise AntherError(f"the SuperLink did not start: {self._end_of_log()}")
            time.sleep(0.1)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the process, by force if it takes too long."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def submit(self, app: Path, overrides: str, settings: Mapping[str, float]) -> int:
        """Start a run, and return its id.

        Args:
            app: folder of the app bundle.
            overrides: overrides of the run's configuration.
            settings: settings of the server for the run.

        Raises:
            AntherError: the SuperLink refused the run.
        """
        run_config = f"overrides={json.dumps(overrides)}"  # a TOML basic string has the syntax of a JSON string
        run_config += "".join(f" {key}={value!r}" for key, value in settings.items())
        response = self._flwr("run", str(app), "anther", "--run-config", run_config, "--format", "json")
        if not response.get("success") or not str(response.get("run-id", "")).isdecimal():
            raise AntherError(f"the SuperLink did not accept the run: {response}")
        return int(response["run-id"])

    def watch(self, run: int) -> subprocess.Popen:
        """Start a process that prints the run's log, and ends with the run or the SuperLink."""
        return subprocess.Popen(
            ["flwr", "log", str(run), "anther", "--stream"],
            env=environment(self.home),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=end_with_parent,
        )

    @property
    def control(self) -> ControlClient:
        return ControlClient(self.address, self.certificates and self.certificates.authority)

    def _flwr(self, *words: str) -> dict[str, Any]:
        process = subprocess.run(
            ["flwr", *words],
            env=environment(self.home),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        try:
            response: dict[str, Any] = json.loads(process.stdout)
        except ValueError:
            output = " ".join((process.stdout + process.stderr).split())[-300:]
            raise AntherError(f"flwr {words[0]}: {output or f'ended with {process.returncode}'}") from None
        if response.get("success") is False:
            raise AntherError(f"flwr {words[0]}: {response.get('error-message', response)}")
        return response

    def _write_flower_config(self) -> None:
        """Write the address of this SuperLink for Flower's command line."""
        security = "insecure = true"
        if self.certificates:
            security = f"root-certificates = {json.dumps(str(self.certificates.authority))}"
        text = f'[superlink]\ndefault = "anther"\n\n[superlink.anther]\naddress = "{self.address}"\n{security}\n'
        write(self.home / "config.toml", text.encode())

    def _tls(self) -> Sequence[str]:
        if self.certificates is None:
            return ["--insecure"]
        authority, certificate, key = self.certificates
        return [
            "--ssl-ca-certfile",
            str(authority),
            "--ssl-certfile",
            str(certificate),
            "--ssl-keyfile",
            str(key),
            "--enable-supernode-auth",
        ]

    def _is_healthy(self) -> bool:
        scheme, context = "http", None
        if self.certificates:
            scheme, context = "https", ssl.create_default_context(cafile=str(self.certificates.authority))
        try:
            with urllib.request.urlopen(f"{scheme}://{self.address}/health", timeout=2, context=context):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def _end_of_log(self) -> str:
        text = self._log.read_text(errors="replace")
        return " ".join(text.split())[-300:]


def save_largest_adapter(size: int) -> None:
    """Store the size in bytes of the run's largest adapter, for the gateway; called in the ServerApp."""
    if folder := os.environ.get(SERVER_FOLDER):
        write(Path(folder) / _LARGEST, str(size).encode())


def largest_adapter(folder: Path) -> int:
    """Read the size in bytes of the run's largest adapter from the server's folder."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / _LARGEST).read_text())
    return _ADAPTER


def stop_leftovers(flower_home: Path) -> None:
    """Kill processes that a dead SuperLink left running: they would hold the port and the database."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(flower_home):
                process.kill()
