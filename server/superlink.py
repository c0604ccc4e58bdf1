"""Flower's SuperLink as a child process, and what its own command line asks of it.

It listens on this machine only: its control API, by which runs are started and nodes let in, knows no passwords. What
devices may reach of it goes through `server.door`.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conf.children import with_parent
from conf.errors import AntherError
from conf.flower import environment
from privacy.durable import write
from server.control import Control

LOOPBACK = "127.0.0.1"
_READY = 60.0  # seconds that it may take to start


class Certificates(NamedTuple):
    """Files that Flower reads."""

    authority: Path
    certificate: Path
    key: Path


@dataclass
class SuperLink:
    """One SuperLink with its database in `folder`.

    Args:
        certificates: None: without TLS, and then without authentication of nodes.
    """

    folder: Path
    port: int
    certificates: Certificates | None
    _process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def home(self) -> Path:
        return self.folder / "flower"

    def start(self) -> None:
        """Start it and return when it answers; AntherError if it doesn't."""
        self._describe()
        with (self.folder / "superlink.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    "flower-superlink", "--host", LOOPBACK, "--port", str(self.port),
                    "--database", str(self.folder / "superlink.db"), "--disable-runtime-dependency-installation",
                    *self._tls(),
                ],
                env=environment(self.home), cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                preexec_fn=with_parent,
            )  # fmt: skip
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

    def submit(self, app: Path, overrides: str) -> int:
        """Start a run; its id."""
        written = json.dumps(overrides)  # a TOML basic string is written like one of JSON
        found = self._flwr("run", str(app), "anther", "--run-config", f"overrides={written}", "--format", "json")
        if not found.get("success") or not str(found.get("run-id", "")).isdecimal():
            raise AntherError(f"the SuperLink did not take the run: {found}")
        return int(found["run-id"])

    def watch(self, run: int) -> subprocess.Popen:
        """A process that prints the run's log and ends with it, or when the SuperLink does."""
        return subprocess.Popen(
            ["flwr", "log", str(run), "anther", "--stream"], env=environment(self.home), cwd=self.folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=with_parent,
        )  # fmt: skip

    @property
    def control(self) -> Control:
        return Control(self.address, self.certificates and self.certificates.authority)

    def _flwr(self, *words: str) -> dict[str, Any]:
        done = subprocess.run(
            ["flwr", *words], env=environment(self.home), cwd=self.folder, capture_output=True, text=True, timeout=120,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
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
            "--ssl-ca-certfile", str(authority), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key),
            "--enable-supernode-auth",
        ]  # fmt: skip

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
        text = (self.folder / "superlink.log").read_text(errors="replace")
        return " ".join(text.split())[-300:]
