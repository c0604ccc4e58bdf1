"""Federation of processes on this machine: a server, and devices with their own homes, all killed at the end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

ROOT = Path(__file__).parents[2]
LOOPBACK = "127.0.0.1"
QUICK = (
    "throttle.require_charging=false",
    "throttle.max_celsius=null",
    "throttle.max_battery_celsius=null",
    "worker.nice=0",
    "worker.threads=1",
    "connection.poll_seconds=0.2",
)
"""Overrides of a test's devices: they train in any sensor state and with short waits."""


def free_port() -> int:
    """Find a free TCP port on the loopback interface."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def write_letter_folders(folder: Path, owners: int, each: int = 10) -> dict[str, Path]:
    """Write a folder of letters for each owner, drawn by development writers.

    Args:
        folder: parent folder.
        owners: number of owners.
        each: letters per owner.

    Returns:
        The folders by name of their owner.
    """
    from typefaces import dataset

    captions = [dataset.caption(glyph) for glyph in dataset.GLYPHS[:each]]
    families = dataset.load("development")
    return {
        f"owner-{number}": write_letters(
            folder / f"owner-{number}", families[number % len(families)].images[:each], captions
        )
        for number in range(owners)
    }


def write_letters(folder: Path, images: Iterable[Any], captions: Sequence[str]) -> Path:
    """Write a folder of captioned pictures in the layout that an owner provides.

    Args:
        folder: folder to create.
        images: pixels of the pictures.
        captions: caption of each picture.
    """
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{n}.png", "text": text}) for n, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition.

    Args:
        condition: the condition.
        seconds: maximum time to wait.
        what: description of the condition.

    Raises:
        AssertionError: the condition did not hold in time, so there is no measurement.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


@dataclass
class ModuleProcess:
    """A process `python -m MODULE WORDS` in the background, with its own home."""

    module: str
    arguments: list[str]
    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    command_prefix: list[str] = field(default_factory=list)
    """Prefix of the command, e.g. to enter a network namespace."""
    process: subprocess.Popen | None = None

    @property
    def log(self) -> Path:
        """File of standard output and standard error."""
        return self.home / f"{self.module}.log"

    @property
    def output(self) -> str:
        """Output of all starts so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def start(self) -> ModuleProcess:
        """Start the process; its output is appended to the log."""
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command_prefix, sys.executable, "-m", self.module, *self.arguments],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment(self.home, self.environment),
            )
        return self

    def stop(self) -> None:
        """Terminate the process, and kill it if it does not exit in 20 seconds."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """Kill the process, and wait for its exit."""
        if self.process:
            self.process.kill()
            self.process.wait()

    @property
    def exit_code(self) -> int | None:
        """Exit status; None while it runs, or before its start."""
        return self.process.poll() if self.process else None

    def children(self, part: str) -> list[psutil.Process]:
        """Return descendants of the process whose command line contains `part`."""
        if self.exit_code is not None or self.process is None:
            return []
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in below if part in " ".join(_line(child))]


def environment(home: Path, more: dict[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment with another home and without settings of Anther or Flower."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ANTHER_", "FLWR_"))}
    return {**inherited, "ANTHER_HOME": str(home), "PYTHONUNBUFFERED": "1", **(more or {})}


def run_module(
    module: str, *arguments: str, home: Path, command_prefix: Sequence[str] = (), stdin: str = ""
) -> subprocess.CompletedProcess:
    """Run `python -m MODULE WORDS` to its end.

    Args:
        module: module to run.
        arguments: its arguments.
        home: the process's home.
        command_prefix: prefix of the command, e.g. to enter a network namespace.
        stdin: standard input.
    """
    return subprocess.run(
        [*command_prefix, sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        input=stdin,
    )


@dataclass
class LocalFederation:
    """A server and its devices in `folder`."""

    folder: Path
    arguments: list[str]
    port: int = field(default_factory=free_port)
    inner: int = field(default_factory=free_port)
    devices: dict[str, ModuleProcess] = field(default_factory=dict)
    host: str = LOOPBACK
    """Address of the server for devices."""
    server: ModuleProcess = field(init=False)

    def __post_init__(self) -> None:
        settings = [
            f"server.port={self.port}",
            f"server.superlink_port={self.inner}",
            f"server.host={self.host}",
            f"server.hostnames=[{self.host}]",
            "server.max_devices_per_holder=99",
            "server.min_devices=1",
        ]
        self.server = ModuleProcess(
            "server.supervisor.run", [*self.arguments, *settings], self.folder / "server", {"ANTHER_TEST": "true"}
        )

    def start(self, seconds: float = 120) -> None:
        """Start the server, and wait until it listens or exits."""
        starts = self.server.output.count("listening on")
        self.server.start()
        wait_until(
            lambda: self.server.output.count("listening on") > starts or self.server.exit_code is not None,
            seconds,
            "a server",
        )
        assert self.server.exit_code is None, self.server.output

    def ticket(self, holder: str = "owner") -> str:
        """Issue an enrollment ticket."""
        process = run_module("server.supervisor.keys", "ticket", "--holder", holder, home=self.server.home)
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    def enroll(self, name: str, data: Path, *arguments: str, command_prefix: Sequence[str] = ()) -> ModuleProcess:
        """Enroll a device without starting it.

        Args:
            name: name of the device and its home.
            data: folder of its pictures.
            arguments: overrides of its configuration.
            command_prefix: prefix of its commands, e.g. to enter a network namespace.
        """
        home = self.folder / name
        process = run_module(
            "client.cli.enroll",
            f"data={data}",
            f"name={name}",
            home=home,
            command_prefix=command_prefix,
            stdin=self.ticket(),
        )
        assert process.returncode == 0, process.stderr
        self.devices[name] = ModuleProcess(
            "client.runtime.supervisor", [*QUICK, *arguments], home, command_prefix=list(command_prefix)
        )
        return self.devices[name]

    @property
    def runs(self) -> list[Path]:
        """Folders of the server's runs, oldest first."""
        return sorted((self.server.home / "runs").glob("*/"))

    def rounds(self) -> int:
        """Return the last complete round of the newest run; -1 if there is none."""
        checkpoints = sorted(self.runs[-1].glob("checkpoints/round-*")) if self.runs else []
        return int(checkpoints[-1].name.removeprefix("round-")) if checkpoints else -1

    def logs(self) -> str:
        """Return the end of all logs, to diagnose a failure."""
        return "\n".join(f"== {p.home.name}\n{p.output[-3000:]}" for p in (self.server, *self.devices.values()))


@contextmanager
def federation(folder: Path, overrides: str, *, host: str = LOOPBACK) -> Iterator[LocalFederation]:
    """Yield a federation that is not started, and kill all its processes at the end.

    Args:
        folder: folder of the server and the devices.
        overrides: configuration of the run.
        host: address of the server for devices.
    """
    running = LocalFederation(folder, shlex.split(overrides), host=host)
    try:
        yield running
    finally:
        for program in (*running.devices.values(), running.server):
            program.stop()
        kill_all(folder)


def kill_all(folder: Path) -> None:
    """Kill all processes with a home in this folder: a killed process may leave children for a moment."""
    for process in psutil.process_iter():
        try:
            home = process.environ().get("ANTHER_HOME", "")
        except psutil.Error:
            continue
        if Path(folder) in (Path(home), *Path(home).parents) and process.pid != os.getpid():
            process.send_signal(signal.SIGKILL)


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
