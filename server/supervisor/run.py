"""The server of a federation of real devices:  anther serve [key=value …]

It makes certificates if there are none, opens one port (`server.gateway`), runs Flower's SuperLink behind it, submits
the run and stays until that is over. Whatever dies is started again, and the run goes on after its last whole round;
so it does when this command, or the machine, is started again with the same configuration.

    anther keys ticket --holder ada      what one of Ada's devices needs to come in
"""

from __future__ import annotations

import contextlib
import shlex
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvicorn
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from common import processes
from common.errors import AntherError
from common.file_lock import exclusive
from common.service import SignalReceived, raise_on_sigterm, say
from conf.cli import hydra_application, program
from conf.compose import compose
from conf.schemas.server import ServeConfig
from models.base import assets, chunk_manifest
from protocol.handshake import ServerHello
from protocol.messages import NEWEST, OLDEST
from server.gateway import base_files
from server.gateway.app import Gateway, now
from server.gateway.device_registry import DeviceRegistry
from server.gateway.listening import reload_certificate, serve
from server.gateway.members import EnrolledNodes
from server.supervisor import run_dirs, server_dir
from server.supervisor.bundle import assemble, version
from server.supervisor.run_log import log_to_console, print_log
from server.supervisor.server_dir import ServerDir
from server.supervisor.superlink import SuperLinkProcess, largest_adapter

_LOOK = 1.0  # seconds between two looks at what is alive
_DAY = 86_400.0  # seconds
_PAUSE, _LONGEST = 2.0, 600.0  # seconds before something that failed is tried again
_DEAF = 600.0  # seconds after which a SuperLink that doesn't answer is started again


@hydra_application("serve", ServeConfig)
def main(config: ServeConfig) -> None:
    typed = [*HydraConfig.get().overrides.task]
    words = [word for word in typed if not word.lstrip("+").startswith("server.")]
    GlobalHydra.instance().clear()  # what the ServerApp composes is composed here too
    raise_on_sigterm()
    with contextlib.suppress(SignalReceived, KeyboardInterrupt):
        log_to_console("server")
        ServerSupervisor(config, run_overrides(words, config.server.devices), typed).run()


def run_overrides(words: list[str], devices: int) -> list[str]:
    """What the ServerApp composes its own configuration of."""
    known = any(word.startswith(("data.devices=", "data.writers=")) for word in words)
    return [*words, *([] if known else ["data.writers=1", f"data.devices={devices}"])]


@dataclass
class ServerSupervisor:
    """All that one server runs.

    Args:
        words: of its runs' configuration.
        typed: what it was started with.
    """

    config: ServeConfig
    words: list[str]
    typed: list[str]
    superlink: SuperLinkProcess = field(init=False)
    members: EnrolledNodes = field(init=False)
    _opened: uvicorn.Server = field(init=False)
    _shown: bytes = b""  # the certificate that devices are shown
    _look_again: float = 0.0  # for whether it ends soon
    _troubled: str = ""  # what was said of it last

    def run(self) -> None:
        """Serve until the run is over; AntherError for what only its operator can mend.

        Whatever else breaks off a run, it goes on after a while, for as long as it takes.
        """
        settings, here = self.config.server, server_dir.of(self.config.server.folder)
        compose(shlex.join(self.words))  # what the ServerApp would refuse is said now
        last = run_dirs.newest_run(shlex.join(self.words), assets.home() / "runs")
        if last is not None and run_dirs.is_finished(last) and not settings.again:
            raise AntherError(f"{last}: the run of this configuration is over; server.again=true begins another")
        say(f"Anther {version()}: {here.folder}")
        here.prepare(settings.hosts, settings.port, settings.per_holder)
        secure = None if settings.insecure else here.certificates
        self.superlink = SuperLinkProcess(here.folder, settings.inner_port, secure, unguarded=settings.unguarded)
        self.members = EnrolledNodes(DeviceRegistry(here.folder, per_holder=settings.per_holder), self.superlink)
        with exclusive(here.folder, what="this federation"):
            stop_leftovers(self.superlink.home)
            self._serve(here)

    def _serve(self, here: ServerDir) -> None:
        settings, secure = self.config.server, self.superlink.certificates
        try:
            self._shown = secure.certificate.read_bytes() if secure else b""
            self.superlink.start()
            self._until_it_answers()
            self.members.reconcile()
            self._opened = serve(self._gateway(here), host=settings.host, port=settings.port, certificates=secure)
            say(f"listening on {settings.host}:{settings.port}" + ("" if secure else ", without TLS or keys"))
            if secure and not self.members:
                say("no devices yet: anther keys ticket --holder NAME, then on the device")
                say("    anther device enroll data=FOLDER && anther device run")
            self._until_over(assemble(here.folder / "app"), assets.home() / "runs")
            self._opened.should_exit = True
        finally:
            self.superlink.stop()

    def _until_over(self, app: Path, folders: Path) -> None:
        pause, before, overrides = _PAUSE, -1, shlex.join(self.words)
        settings = {"min_devices": self.config.server.min_devices, "patience": self.config.server.patience}
        while True:
            self._until_it_answers()
            last = run_dirs.newest_run(overrides, folders)
            resume = last is not None and not run_dirs.is_finished(last)
            words = [*self.words, "resume=true"] if resume else self.words
            try:
                run = self.superlink.submit(app, shlex.join(words), settings)
                say(f"run {run}" + (f" goes on: {last.name}" if resume and last else " began"))
                self._follow(run)
            except (AntherError, OSError, subprocess.SubprocessError) as error:
                say(f"{error}")
            else:
                if reason := run_dirs.take_refusal(folders, run):
                    raise AntherError(reason)
            last = run_dirs.newest_run(overrides, folders)
            if last is not None and run_dirs.is_finished(last):
                run_dirs.save_command(last, shlex.join([*program("server.supervisor.run"), *self.typed]))
                say(f"the run is over: {last}{_write_results(last)}")
                return
            done = run_dirs.last_round(last)
            pause = _PAUSE if done > before >= 0 else min(2 * pause, _LONGEST)
            before = max(done, 0)
            say(f"the run broke off after round {before}; it goes on in {pause:.0f} s")
            until = time.monotonic() + pause
            while time.monotonic() < until:
                if not self._attend():
                    self.superlink.stop()
                time.sleep(_LOOK)

    def _until_it_answers(self) -> None:
        """Return once the SuperLink does what it is asked; one that is gone, or deaf for long, is started again."""
        since = time.monotonic()
        while True:
            try:
                self._revive()
                self.superlink.control.check()
            except AntherError as error:
                self._trouble(error)
            else:
                self._troubled = ""
                return
            if time.monotonic() - since > _DEAF:
                say(f"the SuperLink has not answered for {_DEAF / 60:.0f} min: it starts again")
                self.superlink.stop()
                since = time.monotonic()
            time.sleep(_LOOK)

    def _follow(self, run: int) -> None:
        """Print a run's log until it ends, and look after everything else meanwhile."""
        heard = time.monotonic()
        while True:
            watched = self.superlink.watch(run)
            reader = threading.Thread(target=print_log, args=(watched.stdout,), daemon=True)
            reader.start()
            try:
                while watched.poll() is None:
                    time.sleep(_LOOK)
                    if not self.superlink.alive:
                        say("the SuperLink is gone")
                        return
                    if not self._attend():
                        self.superlink.stop()
                        return
            finally:
                watched.terminate()
                watched.wait()
                reader.join(5)
            if not self.superlink.alive:
                return
            try:  # the log may break off before the run does
                if self.superlink.control.status(run).partition(":")[0] in ("finished", "unknown"):
                    return
                heard = time.monotonic()
            except AntherError as error:
                self._trouble(error)
            if time.monotonic() - heard > _DEAF:
                say(f"the SuperLink has not answered for {_DEAF / 60:.0f} min: it starts again")
                self.superlink.stop()
                return
            time.sleep(10 * _LOOK)

    def _attend(self) -> bool:
        """Shut out who was revoked and renew the certificate; whether the SuperLink can go on as it is."""
        try:
            if self.superlink.alive:
                self.members.remove_revoked()
        except AntherError as error:  # the gateway has shut them out already, and this is tried again
            self._trouble(error)
        if self.superlink.alive and self.superlink.stored_bytes() > self.config.server.disk_gib * 2**30:
            say("messages fill more than server.disk_gib: the SuperLink starts again without them")
            return False
        if self._certified_anew():
            say("the server has a new certificate, with which the SuperLink starts again")
            return False
        return True

    def _trouble(self, error: AntherError) -> None:
        """Say what is wrong, once."""
        if (said := str(error)) != self._troubled:
            say(f"{said}; trying on")
        self._troubled = said

    def _certified_anew(self) -> bool:
        """Whether another certificate is there than was shown; devices are shown it from now on."""
        secure = self.superlink.certificates
        if secure is None:
            return False
        if time.monotonic() > self._look_again:
            self._look_again = time.monotonic() + _DAY
            try:
                server_dir.of(self.config.server.folder).renew()
            except AntherError as error:  # there is a month in which to mend that
                say(f"{error}")
        if (found := secure.certificate.read_bytes()) == self._shown:
            return False
        self._shown = found
        reload_certificate(self._opened, secure)
        return True

    def _revive(self) -> None:
        if not self.superlink.alive:
            stop_leftovers(self.superlink.home)  # its ServerApp looks every while only whether it is still there
            self.superlink.start()
            self.members.reconcile()

    def _gateway(self, here: ServerDir) -> Gateway:
        base = assets.locate(self.config.base.path)
        on_shelf = base_files.BaseFiles([base])
        (content,) = on_shelf.bases
        size = chunk_manifest.build(base).total

        def hello() -> ServerHello:
            return ServerHello(
                oldest=OLDEST,
                newest=NEWEST,
                anther=version(),
                federation=here.fingerprint()[:16],
                base=content,
                base_bytes=size,
                time=now(),
            )

        secure = self.superlink.certificates
        return Gateway(
            inside=f"{'https' if secure else 'http'}://{self.superlink.address}",
            hello=hello,
            register=self.members.register,
            authority=secure.authority.read_bytes() if secure else b"",
            register_node=self.members.register_node,
            node_of=self.members.node_of,
            largest=lambda: largest_adapter(here.folder),
            shelf=base_files.routes(on_shelf),
            verify=_trusting(secure.authority) if secure else False,
            folder=here.spool(),
            limits=self.config.server.limits,
        )


def _write_results(folder: Path) -> str:
    """Write a run's report, in a process of its own, which may fail: it can be written later. Where it is, in words."""
    command, variables = processes.python("server.report.results", str(folder)), processes.environment()
    done = subprocess.run(command, env=variables, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return f". Its report could not be written ({why}); later: anther results {folder}"
    return f". Its report: {done.stdout.strip()}"


def stop_leftovers(flower: Path) -> None:
    """End what a SuperLink that is gone left running: it would hold the port and the database."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(flower):
                process.kill()


def _trusting(authority: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority))


if __name__ == "__main__":
    main()
