"""A real federation: SuperLink, TLS, keys, SuperNodes and workers as processes of their own, on loopback."""

from __future__ import annotations

import shlex
import socket
import ssl
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch

from client.device import from_config
from client.worker import stated
from conf.compose import compose
from conf.node import compose as compose_node
from models.base import load
from server import checkpoint
from server.federation import federate
from server.run import of_run
from simulations.grid import CohortGrid
from strategies.build import build
from strategies.full_plan import training_plan
from tests.deployed import LOOPBACK, Deployed, Program, command, deployed, until, write_letters
from training.engine import perform
from typefaces import dataset

RUN = (
    "rounds=3 fleet.sample=3 privacy=example privacy.epsilon=8 privacy.delta=1e-3 adapter.shared.rank=4 "
    "adapter.shared.steps=2 adapter.personal.steps=1 evaluation.timesteps=1 strategy.timeout=300"
)
OWNERS = ("ada", "ben", "cleo")
SEED = 7

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found and ended in /proc")


def letters(folder: Path) -> dict[str, Path]:
    """Each owner's letters."""
    families = dataset.load("development")[: len(OWNERS)]
    captions = [dataset.caption(glyph) for glyph in dataset.GLYPHS[:10]]
    return {
        owner: write_letters(folder / owner, family.images[:10], captions)
        for owner, family in zip(OWNERS, families, strict=True)
    }


@pytest.fixture(scope="module")
def over(tmp_path_factory):
    """A federation after its run, with all of it still there."""
    folder = tmp_path_factory.mktemp("federation")
    pictures = letters(folder / "pictures")
    with deployed(folder, RUN) as federation:
        federation.start()
        for owner in OWNERS:
            federation.enrol(owner, pictures[owner], "test=true", f"seed={SEED}").start()
        refusals = refused(federation, pictures["ada"])
        until(lambda: federation.server.code is not None, 400, f"the run's end\n{federation.told()}")
        assert federation.server.code == 0, federation.told()
        yield federation, pictures, refusals


def refused(federation: Deployed, pictures: Path) -> dict[str, str]:
    """What becomes of who has no business here, while the federation runs."""
    used = command("client.enroll", federation.ticket(), f"data={pictures}", "name=dora", home=federation.folder / "d")
    assert used.returncode == 0, used.stderr
    ticket = federation.ticket()
    first = command("client.enroll", ticket, f"data={pictures}", "name=emil", home=federation.folder / "e")
    assert first.returncode == 0, first.stderr
    again = command("client.enroll", ticket, f"data={pictures}", "name=eve", home=federation.folder / "f")
    # A key that nobody enrolled, with everything else right.
    stranger = Program("client.run", ["link.slow_poll_seconds=1"], federation.folder / "d")
    (stranger.home / "link" / "node.key").unlink()
    from client.link import _new_key

    (stranger.home / "link" / "node.key").write_bytes(_new_key())
    stranger.start()
    until(lambda: stranger.code is not None, 120, f"a stranger's refusal\n{stranger.said}")
    with socket.create_connection((LOOPBACK, federation.port), timeout=10) as plain:
        plain.sendall(b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        plain.settimeout(10)
        try:
            answer = plain.recv(100)
        except ConnectionError:
            answer = b""
    nobody = ssl.create_default_context()
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    with httpx.Client(base_url=f"https://{LOOPBACK}:{federation.port}", verify=nobody) as client:
        control = client.post("/v1/control/list-runs", content=b"").status_code
        shelf = client.get("/v1/anther/base/x/manifest").status_code
        fleet = client.post("/v1/fleet/pull-messages", content=b"").status_code
    return {
        "used": again.stderr, "stranger": stranger.said, "plain": answer.decode(errors="replace"),
        "control": str(control), "shelf": str(shelf), "fleet": str(fleet),
    }  # fmt: skip


def test_it_comes_to_what_a_simulation_of_the_same_seed_comes_to(over, tmp_path, monkeypatch):
    federation, pictures, _ = over
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    config = compose(shlex.join(of_run(shlex.split(RUN), 100)))
    base = load(config.base.path, sites=config.adapter.sites)
    devices = []
    for owner in OWNERS:
        words = [f"data={pictures[owner]}", f"name={owner}", "test=true", f"seed={SEED}"]
        devices.append(from_config(stated(compose_node(words, tmp_path / "none"), base.hash), base))
    plan = training_plan(config, run="simulated", base=base.hash)
    state = federate(
        config, grid=CohortGrid(devices, partial(perform, base, memory=1 << 30, timesteps=1)),
        strategy=build(config, plan, base.sites, accept_simulated=True), plan=plan, saved=None,
        checkpoints=tmp_path / "checkpoints", on_round=lambda _: None, present=3, personal_on=(),
    )  # fmt: skip
    (run,) = federation.runs
    deployed_state = checkpoint.load(run / "checkpoints", sites=base.sites)
    assert deployed_state.round == state.round == 3
    assert all(done.train.replied == 3 for done in deployed_state.history[1:])
    for site, (a, b) in state.adapter.items():
        other = deployed_state.adapter[site]
        apart = torch.linalg.norm(b @ a - other.b @ other.a)
        assert apart <= 1e-4 * max(1.0, float(torch.linalg.norm(b @ a))), site


def test_what_was_noised_reproducibly_is_no_release(over):
    federation, *_ = over
    for owner in OWNERS:
        done = command("client.ledger", "--name", owner, home=federation.folder / owner)
        assert "no: test" in done.stdout, done.stdout + done.stderr
        assert "ε=" not in done.stdout.split("All of it together")[0]


def test_strangers_are_refused(over):
    *_, refusals = over
    assert "works once" in refusals["used"]
    assert "isn't enrolled there, or was revoked" in refusals["stranger"]
    assert "200" not in refusals["plain"]
    assert (refusals["shelf"], refusals["fleet"]) == ("401", "401")
    assert refusals["control"] in ("401", "404", "405")  # nothing behind the door but what devices need


def test_every_device_has_a_personal_adapter(over):
    federation, *_ = over
    for owner in OWNERS:
        assert list((federation.folder / owner).rglob("personal.safetensors")), federation.devices[owner].said
