"""Server of a federation of real devices:  anther serve [key=value …]

It creates certificates if there are none, opens one port (`server.gateway`), runs Flower's SuperLink behind it, submits
the run and stays until the run is over. A process that dies is restarted, and the run continues after its last complete
round. The same happens when this command, or the machine, is restarted with the same configuration.

    anther keys ticket --holder ada      a ticket, with which one of Ada's devices enrolls
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

import uvicorn
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from common import processes
from common.errors import AntherError
from common.file_lock import exclusive
from common.service import SignalReceived, raise_on_sigterm, say
from conf.cli import hydra_application, program
from conf.compose import compose_federation
from conf.schemas.server import ServeConfig
from conf.simulation_keys import refuse_simulation_keys
from models.files import assets, chunk_manifest
from protocol.handshake import ServerHello
from protocol.messages import NEWEST, OLDEST
from server.gateway import base_files
from server.gateway.app import Gateway, now
from server.gateway.device_registry import DeviceRegistry
from server.gateway.listening import reload_certificate, serve
from server.supervisor import run_dirs, server_dir
from server.supervisor.bundle import assemble, version
from server.supervisor.enrolled_nodes import EnrolledNodes
from server.supervisor.run_log import log_to_console, print_log
from server.supervisor.server_dir import ServerDir
from server.supervisor.superlink import SuperLinkProcess, largest_adapter, stop_leftovers

_POLL = 1.0  # seconds between two checks of processes
_DAY = 86_400.0  # seconds
_PAUSE, _LONGEST = 2.0, 600.0  # seconds before the first retry, and the maximum
_MAX_SILENCE = 600.0  # seconds after which a SuperLink that doesn't answer is restarted


@hydra_application("serve", ServeConfig, check=refuse_simulation_keys)
def main(config: ServeConfig) -> None:
    typed = [*HydraConfig.get().overrides.task]
    words = [word for word in typed if not word.lstrip("+").startswith("server.")]
    GlobalHydra.instance().clear()  # this process also composes the ServerApp's configuration
    raise_on_sigterm()
    with contextlib.suppress(SignalReceived, KeyboardInterrupt):
        log_to_console("server")
        ServerSupervisor(config, run_overrides(words, config.server.max_devices), typed).run()


def run_overrides(words: list[str], devices: int) -> list[str]:
    """Return the overrides from which the ServerApp composes its configuration."""
    has_devices = any(word.lstrip("+").startswith("data.devices=") for word in words)
    return [*words, *([] if has_devices else [f"data.devices={devices}"])]


@dataclass
class ServerSupervisor:
    """Start and supervise all processes of one server.

    Args:
        words: overrides of the runs' configuration.
        typed: arguments that the server was started with.
    """

    config: ServeConfig
    words: list[str]
    typed: list[str]
    superlink: SuperLinkProcess = field(init=False)
    nodes: EnrolledNodes = field(init=False)
    _server: uvicorn.Server = field(init=False)
    _certificate: bytes = b""  # certificate that is presented to devices
    _next_renewal_check: float = 0.0  # time of the next check whether the certificate expires soon
    _reported: str = ""  # last reported problem of the SuperLink

    def run(self) -> None:
        """Serve until the run is finished. If a run fails for a reason that may pass, it is retried without limit.

        Raises:
            AntherError: only the operator can fix the problem.
        """
        settings, directory = self.config.server, server_dir.of(self.config.server.folder)
        compose_federation(self.words)  # raise now instead of in the ServerApp
        last = run_dirs.newest_run(shlex.join(self.words), assets.home() / "runs")
        if last is not None and run_dirs.is_finished(last) and not settings.allow_rerun:
            raise AntherError(
                f"{last}: the run of this configuration is over; to start another, set server.allow_rerun=true"
            )
        say(f"Anther {version()}: {directory.folder}")
        directory.prepare(settings.hostnames, settings.port, settings.max_devices_per_holder)
        secure = None if settings.insecure else directory.certificates
        self.superlink = SuperLinkProcess(
            directory.folder, settings.superlink_port, secure, unguarded=settings.trust_local_users
        )
        self.nodes = EnrolledNodes(
            DeviceRegistry(directory.folder, per_holder=settings.max_devices_per_holder), self.superlink
        )
        with exclusive(directory.folder, what="this federation"):
            stop_leftovers(self.superlink.home)
            self._serve(directory)

    def _serve(self, directory: ServerDir) -> None:
        settings, secure = self.config.server, self.superlink.certificates
        try:
            self._certificate = secure.certificate.read_bytes() if secure else b""
            self.superlink.start()
            self._wait_for_superlink()
            self.nodes.reconcile()
            self._server = serve(self._gateway(directory), host=settings.host, port=settings.port, certificates=secure)
            say(f"listening on {settings.host}:{settings.port}" + ("" if secure else ", without TLS or keys"))
            if secure and not self.nodes:
                say("no devices yet: anther keys ticket --holder NAME, then on the device")
                say("    anther device enroll data=FOLDER && anther device run")
            self._run_until_finished(assemble(directory.folder / "app"), assets.home() / "runs")
            self._server.should_exit = True
        finally:
            self.superlink.stop()

    def _run_until_finished(self, app: Path, runs: Path) -> None:
        pause, last_done, overrides = _PAUSE, -1, shlex.join(self.words)
        settings = {"min_devices": self.config.server.min_devices, "patience": self.config.server.max_idle_hours}
        while True:
            self._wait_for_superlink()
            last = run_dirs.newest_run(overrides, runs)
            resume = last is not None and not run_dirs.is_finished(last)
            words = [*self.words, "resume=true"] if resume else self.words
            try:
                run = self.superlink.submit(app, shlex.join(words), settings)
                say(f"run {run}" + (f" continues: {last.name}" if resume and last else " began"))
                self._follow(run)
            except (AntherError, OSError, subprocess.SubprocessError) as error:
                say(f"{error}")
            else:
                if reason := run_dirs.take_refusal(runs, run):
                    raise AntherError(reason)
            last = run_dirs.newest_run(overrides, runs)
            if last is not None and run_dirs.is_finished(last):
                run_dirs.save_command(last, shlex.join([*program("server.supervisor.run"), *self.typed]))
                say(f"the run is over: {last}{_write_results(last)}")
                return
            done = run_dirs.last_round(last)
            pause = _PAUSE if done > last_done >= 0 else min(2 * pause, _LONGEST)
            last_done = max(done, 0)
            say(f"the run broke off after round {last_done}; it continues in {pause:.0f} s")
            until = time.monotonic() + pause
            while time.monotonic() < until:
                if not self._attend():
                    self.superlink.stop()
                time.sleep(_POLL)

    def _wait_for_superlink(self) -> None:
        """Wait until the SuperLink answers requests; restart it if it died or doesn't answer for a long time."""
        since = time.monotonic()
        while True:
            try:
                self._restart_if_dead()
                self.superlink.control.check()
            except AntherError as error:
                self._report(error)
            else:
                self._reported = ""
                return
            if time.monotonic() - since > _MAX_SILENCE:
                say(f"the SuperLink has not answered for {_MAX_SILENCE / 60:.0f} min: restarting it")
                self.superlink.stop()
                since = time.monotonic()
            time.sleep(_POLL)

    def _follow(self, run: int) -> None:
        """Print a run's log until the run ends, and attend to the other processes in the meantime."""
        answered = time.monotonic()
        while True:
            process = self.superlink.watch(run)
            reader = threading.Thread(target=print_log, args=(process.stdout,), daemon=True)
            reader.start()
            try:
                while process.poll() is None:
                    time.sleep(_POLL)
                    if not self.superlink.alive:
                        say("the SuperLink ended")
                        return
                    if not self._attend():
                        self.superlink.stop()
                        return
            finally:
                process.terminate()
                process.wait()
                reader.join(5)
            if not self.superlink.alive:
                return
            try:  # the log may break off before the run ends
                if self.superlink.control.status(run).partition(":")[0] in ("finished", "unknown"):
                    return
                answered = time.monotonic()
            except AntherError as error:
                self._report(error)
            if time.monotonic() - answered > _MAX_SILENCE:
                say(f"the SuperLink has not answered for {_MAX_SILENCE / 60:.0f} min: restarting it")
                self.superlink.stop()
                return
            time.sleep(10 * _POLL)

    def _attend(self) -> bool:
        """Remove revoked devices and renew the certificate; False if the SuperLink has to be restarted."""
        try:
            if self.superlink.alive:
                self.nodes.remove_revoked()
        except AntherError as error:  # the gateway refuses them already, and this is retried
            self._report(error)
        if self.superlink.alive and self.superlink.stored_bytes() > self.config.server.max_disk_gib * 2**30:
            say("messages fill more than server.max_disk_gib: restarting the SuperLink without them")
            return False
        if self._has_new_certificate():
            say("the server has a new certificate: restarting the SuperLink with it")
            return False
        return True

    def _report(self, error: AntherError) -> None:
        """Report a problem, once."""
        if (text := str(error)) != self._reported:
            say(f"{text}; retrying")
        self._reported = text

    def _has_new_certificate(self) -> bool:
        """Check for a new certificate, and present it to devices from now on; True if there is one."""
        secure = self.superlink.certificates
        if secure is None:
            return False
        if time.monotonic() > self._next_renewal_check:
            self._next_renewal_check = time.monotonic() + _DAY
            try:
                server_dir.of(self.config.server.folder).renew()
            except AntherError as error:  # a month is left to fix it
                say(f"{error}")
        if (certificate := secure.certificate.read_bytes()) == self._certificate:
            return False
        self._certificate = certificate
        reload_certificate(self._server, secure)
        return True

    def _restart_if_dead(self) -> None:
        if not self.superlink.alive:
            stop_leftovers(self.superlink.home)  # its ServerApp may still run: it checks its SuperLink rarely
            self.superlink.start()
            self.nodes.reconcile()

    def _gateway(self, directory: ServerDir) -> Gateway:
        base = assets.locate(self.config.base.path)
        files = base_files.BaseFiles([base])
        (content,) = files.bases
        size = chunk_manifest.build(base).total

        def hello() -> ServerHello:
            return ServerHello(
                oldest=OLDEST,
                newest=NEWEST,
                anther=version(),
                federation=directory.fingerprint()[:16],
                base=content,
                base_bytes=size,
                time=now(),
            )

        secure = self.superlink.certificates
        return Gateway(
            superlink_url=f"{'https' if secure else 'http'}://{self.superlink.address}",
            hello=hello,
            registry=self.nodes.registry,
            authority=secure.authority.read_bytes() if secure else b"",
            register_node=self.nodes.register_node,
            node_of=self.nodes.node_of,
            largest=lambda: largest_adapter(directory.folder),
            base_routes=base_files.routes(files),
            verify=ssl.create_default_context(cafile=str(secure.authority)) if secure else False,
            folder=directory.spool(),
            limits=self.config.server.limits,
        )


def _write_results(folder: Path) -> str:
    """Write a run's report in a separate process, and return a message. On failure, it can be written later."""
    command, variables = processes.python("server.report.results", str(folder)), processes.environment()
    done = subprocess.run(command, env=variables, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return f". Its report could not be written ({reason}); write it with anther results {folder}"
    return f". Its report: {done.stdout.strip()}"


if __name__ == "__main__":
    main()
