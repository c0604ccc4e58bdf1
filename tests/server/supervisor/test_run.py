"""A real federation on loopback: SuperLink, TLS, keys, SuperNodes and workers as separate processes."""

from __future__ import annotations

import json
import shlex
import socket
import ssl
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from bench.reliability.processes import (
    LOOPBACK,
    LocalFederation,
    ModuleProcess,
    federation,
    run_module,
    wait_until,
    write_letter_folders,
)
from client.device import from_config
from client.runtime.worker import stated
from conf.compose import compose_federation
from conf.schemas.node import compose as compose_node
from models.base.base import load
from server.rounds import checkpoint
from server.rounds.federation import federate
from server.supervisor.run import run_overrides
from simulations.grid.cohort import CohortGrid
from strategies.factory.full_plan import training_plan
from strategies.factory.strategy import build
from training.engine import perform

SETTINGS = (
    "privacy=example privacy.epsilon=8 privacy.delta=1e-3 adapter.shared.rank=4 adapter.shared.steps=2 "
    "adapter.personal.steps=1 evaluation.timesteps=1 round_loop.timeout=300"
)
OWNERS = ("owner-0", "owner-1", "owner-2")
DEVICE = ("test=true", "seed=7", "device=cpu")  # comparable with the simulation, even with a GPU

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.mark.integration
def test_federation_of_processes(tmp_path, monkeypatch):
    """One round of two devices. All checks are in one test, since another would run the federation again."""
    owners, settings = OWNERS[:2], f"rounds=1 cohort.size=2 {SETTINGS}"
    folder = tmp_path / "federation"
    pictures = write_letter_folders(folder / "pictures", len(owners), each=4)
    with federation(folder, settings) as running:
        running.start()
        for owner in owners:
            running.enroll(owner, pictures[owner], *DEVICE).start()
        wait_until(lambda: running.rounds() >= 0, 300, f"the first evaluation\n{running.logs()}")
        check_unauthenticated_requests(running)
        finish(running)
        check_equal_to_simulation(running, settings, pictures, tmp_path / "simulated", monkeypatch)
        check_no_release_in_tests(running, owners[:1])
        check_personal_adapters(running, owners)
        check_results(running, rounds=1, devices=2)


@pytest.mark.stress
def test_kills_and_strangers_change_nothing(tmp_path, monkeypatch):
    settings = f"rounds=3 cohort.size=3 {SETTINGS}"
    folder = tmp_path / "federation"
    pictures = write_letter_folders(folder / "pictures", len(OWNERS), each=8)
    with federation(folder, settings) as running:
        running.start()
        for owner in OWNERS:
            running.enroll(owner, pictures[owner], *DEVICE).start()
        wait_until(lambda: running.rounds() >= 1, 300, f"the first round\n{running.logs()}")
        for process in (
            *running.devices[OWNERS[0]].children("client.runtime.worker"),
            *running.server.children("flwr-serverapp"),
        ):
            process.kill()  # neither changes the results
        refusals = collect_refusals(running, pictures[OWNERS[0]])
        finish(running)
        assert "the run broke off" in running.server.output
        check_equal_to_simulation(running, settings, pictures, tmp_path / "simulated", monkeypatch)
        check_no_release_in_tests(running, OWNERS)
        check_refusals(refusals)
        check_personal_adapters(running, OWNERS)
        check_results(running, rounds=3, devices=3)


def finish(running: LocalFederation) -> None:
    wait_until(lambda: running.server.exit_code is not None, 400, f"the run's end\n{running.logs()}")
    assert running.server.exit_code == 0, running.logs()


def collect_refusals(running: LocalFederation, pictures: Path) -> dict[str, str]:
    """Try to get access without permission while the federation runs, and return the refusals."""
    enrolled = run_module(
        "client.cli.enroll", f"data={pictures}", "name=dora", home=running.folder / "d", stdin=running.ticket()
    )
    assert enrolled.returncode == 0, enrolled.stderr
    ticket = running.ticket()
    first = run_module("client.cli.enroll", f"data={pictures}", "name=emil", home=running.folder / "e", stdin=ticket)
    assert first.returncode == 0, first.stderr
    again = run_module("client.cli.enroll", f"data={pictures}", "name=eve", home=running.folder / "f", stdin=ticket)
    owner = running.devices[OWNERS[1]]
    second = ModuleProcess(
        "client.runtime.supervisor", owner.arguments, running.folder / "second", {"ANTHER_HOME": str(owner.home)}
    ).start()
    wait_until(lambda: second.exit_code is not None, 120, f"a second one's refusal\n{second.output}")
    # A key that isn't enrolled, with everything else correct.
    stranger = ModuleProcess("client.runtime.supervisor", ["connection.max_poll_seconds=1"], running.folder / "d")
    (stranger.home / "link" / "node.key").unlink()
    from client.runtime.server_connection import _new_key

    (stranger.home / "link" / "node.key").write_bytes(_new_key())
    stranger.start()
    wait_until(lambda: stranger.exit_code is not None, 120, f"a stranger's refusal\n{stranger.output}")
    return {"enrolled": again.stderr, "second": second.output, "stranger": stranger.output}


def check_unauthenticated_requests(running: LocalFederation) -> None:
    with socket.create_connection((LOOPBACK, running.port), timeout=10) as plain:
        plain.sendall(b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        plain.settimeout(10)
        try:
            answer = plain.recv(100)
        except ConnectionError:
            answer = b""
    assert b"200" not in answer
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    with httpx.Client(base_url=f"https://{LOOPBACK}:{running.port}", verify=unverified) as client:
        assert client.get("/v1/anther/base/x/manifest").status_code == 401
        assert client.post("/v1/fleet/pull-messages", content=b"").status_code == 401
        control = client.post("/v1/control/list-runs", content=b"").status_code
        assert control in (401, 404, 405)  # only the endpoints that devices need


def check_equal_to_simulation(running, settings, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    config = compose_federation(run_overrides(shlex.split(settings), 100))
    base = load(config.base.path, sites=config.adapter.sites)
    devices = []
    for owner in pictures:
        arguments = [f"data={pictures[owner]}", f"name={owner}", *DEVICE]
        devices.append(from_config(stated(compose_node(arguments, tmp_path / "none"), base.hash), base))
    plan = training_plan(config, run="simulated", base=base.hash)
    state = federate(
        config,
        grid=CohortGrid(devices, partial(perform, base, memory=1 << 30, timesteps=1)),
        strategy=build(config, plan, base.sites, accept_simulated=True),
        plan=plan,
        saved=None,
        checkpoints=tmp_path / "checkpoints",
        on_round=lambda _: None,
        min_devices=len(devices),
        personalized_devices=(),
    )
    (run,) = running.runs
    deployed_state = checkpoint.load(run / "checkpoints", sites=base.sites)
    assert deployed_state.round == state.round == config.rounds
    assert all(done.train.replied == len(devices) for done in deployed_state.history[1:])
    for site, (a, b) in state.adapter.items():
        other = deployed_state.adapter[site]
        apart = torch.linalg.norm(b @ a - other.b @ other.a)
        assert apart <= 1e-4 * max(1.0, float(torch.linalg.norm(b @ a))), site


def check_no_release_in_tests(running, owners):
    for owner in owners:
        done = run_module("client.cli.ledger", "--name", owner, home=running.folder / owner)
        assert "no: test" in done.stdout, done.stdout + done.stderr
        assert "ε=" not in done.stdout.split("Total: ")[0]


def check_refusals(refusals):
    assert "works only once" in refusals["enrolled"]
    assert "isn't enrolled there, or was revoked" in refusals["stranger"]
    assert "is in use by process" in refusals["second"]


def check_results(running, rounds, devices):
    (run,) = running.runs
    assert len(load_file(run / "adapters" / "shared.safetensors")) == 2 * 56
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(rounds + 1))
    (line,) = (line for line in running.server.output.splitlines() if "the run is over" in line)
    assert str(run / "report.html") in line
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["rounds"], summary["clients"], summary["test"]) == (rounds, devices, True)
    assert 0 < summary["epsilon"]["value"] <= 8
    assert "so not a release" in (run / "report.html").read_text()


def check_personal_adapters(running, owners):
    for owner in owners:
        assert list((running.folder / owner).rglob("personal.safetensors")), running.devices[owner].output
