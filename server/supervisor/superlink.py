"""Flower's SuperLink as a child process, and the commands of Flower's that are given to it.

It listens on loopback, for its own user only (`server.supervisor.local_superlink`): its control API, by which runs are started and
nodes registered, knows no passwords. Devices reach of it what `server.gateway` lets through.
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
from typing import Any, NamedTuple

from common.atomic_files import write
from common.errors import AntherError
from common.flower import environment
from common.processes import end_with_parent, python
from server.supervisor import database
from server.supervisor.control import ControlClient
from server.supervisor.local_superlink import UNGUARDED

LOOPBACK = "127.0.0.1"
SERVER_FOLDER = "ANTHER_SERVER"
"""Environment variable that tells a ServerApp where its server's folder is."""

_LARGEST = "largest"  # file in a server's folder
_ADAPTER = 64 << 20  # bytes, where no ServerApp has told

_LONG = 64 << 20  # bytes of a log that is begun anew at the next start

_READY = 60.0  # seconds that it may take to start


class Certificates(NamedTuple):
    """Files that Flower reads."""

    authority: Path
    certificate: Path
    key: Path


@dataclass
class SuperLinkProcess:
    """One SuperLink with its database in `folder`.

    Args:
        certificates: None: without TLS, and then without authentication of nodes.
        unguarded: whether other local users may connect, where the system can't tell users apart.
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
        return self.folder / "flower"

    @property
    def _log(self) -> Path:
        return self.folder / "superlink.log"

    @property
    def _database(self) -> Path:
        return self.folder / "superlink.db"

    def stored_bytes(self) -> int:
        """Bytes of its database on disk."""
        return database.size(self._database)

    def start(self) -> None:
        """Start it and return when it answers; AntherError if it doesn't."""
        self._describe()
        database.prepare(self._database)
        own = {SERVER_FOLDER: str(self.folder), **({UNGUARDED: "1"} if self.unguarded else {})}
        if self._log.exists() and self._log.stat().st_size > _LONG:
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
                env=environment(self.home) | own,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=end_with_parent,
            )
        until = time.monotonic() + _READY
        while not self._answers():
            if not self.alive or time.monotonic() > until:
                self.stop()
                raise AntherError(f"the SuperLink did not start: {self._last_words()}")
            time.sleep(0.1)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def submit(self, app: Path, overrides: str, settings: Mapping[str, float]) -> int:
        """Start a run with this configuration and these settings of its server; its id."""
        written = f"overrides={json.dumps(overrides)}"  # a TOML basic string is written like one of JSON
        written += "".join(f" {key}={value!r}" for key, value in settings.items())
        found = self._flwr("run", str(app), "anther", "--run-config", written, "--format", "json")
        if not found.get("success") or not str(found.get("run-id", "")).isdecimal():
            raise AntherError(f"the SuperLink did not take the run: {found}")
        return int(found["run-id"])

    def watch(self, run: int) -> subprocess.Popen:
        """A process that prints the run's log and ends with it, or when the SuperLink does."""
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
        done = subprocess.run(
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
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            said = " ".join((done.stdout + done.stderr).split())[-300:]
            raise AntherError(f"flwr {words[0]}: {said or f'ended with {done.returncode}'}") from None
        if found.get("success") is False:
            raise AntherError(f"flwr {words[0]}: {found.get('error-message', found)}")
        return found

    def _describe(self) -> None:
        """Tell Flower's command line where this SuperLink is."""
        safe = "insecure = true"
        if self.certificates:
            safe = f"root-certificates = {json.dumps(str(self.certificates.authority))}"
        text = f'[superlink]\ndefault = "anther"\n\n[superlink.anther]\naddress = "{self.address}"\n{safe}\n'
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

    def _answers(self) -> bool:
        scheme, context = "http", None
        if self.certificates:
            scheme, context = "https", ssl.create_default_context(cafile=str(self.certificates.authority))
        try:
            with urllib.request.urlopen(f"{scheme}://{self.address}/health", timeout=2, context=context):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def _last_words(self) -> str:
        text = self._log.read_text(errors="replace")
        return " ".join(text.split())[-300:]


def save_largest_adapter(size: int) -> None:
    """Tell the gateway, from a ServerApp, how many bytes the largest adapter of its run has."""
    if folder := os.environ.get(SERVER_FOLDER):
        write(Path(folder) / _LARGEST, str(size).encode())


def largest_adapter(folder: Path) -> int:
    """Bytes of the largest adapter of the run of this server's folder."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / _LARGEST).read_text())
    return _ADAPTER
