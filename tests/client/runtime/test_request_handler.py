"""What a server's messages can have a device do: its base, its memory and its guard are its owner's alone."""

import json
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from PIL import Image

from client.paths import device_files
from client.power.conditions import Conditions
from client.power.meter import Meter
from client.runtime import request_handler
from client.runtime.request_handler import WorkerResources
from client.runtime.throttle import Throttle
from client.runtime.worker import stated
from client.store.open import open_store
from conf.schemas import node as nodes
from conf.schemas.node import compose
from models.lora.adapter import init_adapter, to_tensors
from privacy.policy import RequestRefusedError
from protocol.messages import DeviceReport, Evaluate, Evaluation, Query
from protocol.tensor_codec import encode
from training.jobs import Cancelled

GOOD = Conditions(free_mib=1e6, charging=True, battery=0.9)
LOW = replace(GOOD, charging=False, battery=0.05)
ONE, OTHER = (
    ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q",),
    ("mid_block.attentions.0.transformer_blocks.0.attn1.to_k", "conv_in"),
)


class Device:
    """One on a tiny base, whose sensors say what a test wants, and how often they were read."""

    def __init__(self, node, folder, store):
        self.now, self.reads = [GOOD], 0
        throttle = Throttle(nodes.ThrottleConfig(min_free_mib=0, max_wait_seconds=0.0), self.read)
        throttle._fresh_until = float("-inf")
        self.resources = WorkerResources(store=store, read=self.read, meter=Meter(None, watts=5.0), throttle=throttle)
        self.stated = stated(node, str(folder))

    def read(self):
        self.reads += 1
        return self.now.pop(0) if len(self.now) > 1 else self.now[0]

    def ask(self, request):
        self.resources.throttle._fresh_until = float("-inf")  # it looks anew
        return request_handler.answer(request, self.stated, resources=self.resources)


@pytest.fixture
def loads(monkeypatch):
    """The paths of what was loaded."""
    found, load = [], request_handler.load

    def counted(path, **options):
        found.append(path)
        return load(path, **options)

    monkeypatch.setattr(request_handler, "load", counted)
    request_handler._loaded.unload()
    yield found
    request_handler._loaded.unload()


@pytest.fixture
def device(tmp_path, monkeypatch, pipeline_folder, loads):
    del loads
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    lines, random = [], np.random.default_rng(0)
    for k in range(6):
        Image.fromarray(random.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": f"a {k}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    words = [f"data={tmp_path}", "name=pi", "worker.memory_gib=0.25", "device=cpu"]
    node = compose(words, tmp_path / "none")
    with open_store(device_files("pi")) as found:
        yield Device(node, pipeline_folder, found.store)


def evaluate(base, **more):
    return Evaluate(run="r", round=1, adapter=encode(to_tensors(init_adapter(base.sites, 1, 0))), **more)


def test_alternating_sites_load_nothing_again(device, loads):
    for sites in (ONE, OTHER, ONE, None, OTHER):
        assert isinstance(device.ask(Query(adapted=sites)), DeviceReport)
        base = request_handler._loaded._base
        assert sites is None or set(base.sites) == set(sites)
    assert len(loads) == 1
    assert isinstance(device.ask(replace(evaluate(base), adapted=OTHER)), Evaluation)  # at the layers that it names


@pytest.mark.parametrize("sites", [("nowhere",), ("",), (*ONE, *ONE), ("(.*.*)*!",), ("${oc.env:HOME}",)])
def test_sites_are_names(device, sites):
    found = device.ask(Query(adapted=sites))
    assert isinstance(found, RequestRefusedError)


def test_a_query_does_no_work_while_the_guard_says_no(device, loads):
    device.now = [LOW]
    assert isinstance(device.ask(Query()), Cancelled)
    assert not loads
    device.now = [GOOD]
    device.ask(Query())
    device.now = [LOW]
    report = device.ask(Query())
    assert (report.charging, report.battery) == (False, 0.0)  # what it knows it tells
    assert isinstance(device.ask(Query(adapted=OTHER)), Cancelled)


def test_no_request_begins_while_the_guard_says_no(device):
    device.ask(Query())
    request = evaluate(request_handler._loaded._base)
    device.now = [LOW]
    found = device.ask(request)
    assert isinstance(found, Cancelled)
    assert not device.resources.store.ledger.entries()  # nothing was composed or charged


def test_the_guard_stops_whatever_goes_on(device, monkeypatch):
    """At whichever of its questions the charger is pulled, encoding and measuring end there, without a reply."""
    device.ask(Query())
    request = evaluate(request_handler._loaded._base)
    device.resources.store.examples = lambda *_: None  # so that pictures are encoded too
    throttle = device.resources.throttle
    monkeypatch.setattr("client.runtime.throttle.interval", lambda _: -1.0)  # no reading is fresh

    def asked(pulled_at):
        """How often it was asked until there was a reply, or none."""
        reads = count()
        throttle._read = lambda: LOW if next(reads) >= pulled_at else GOOD
        return device.ask(request), next(reads)

    assert isinstance(asked(pulled_at=1000)[0], Evaluation)  # what is cached of it is there from now on
    reply, total = asked(pulled_at=1000)
    assert isinstance(reply, Evaluation)
    assert total >= 7  # the request, its encoding, a picture and two passes of that, the measuring and its pass
    for number in range(total):
        found, _ = asked(pulled_at=number)
        assert isinstance(found, Cancelled), number


def test_timesteps_are_bounded_by_the_owner(device):
    device.ask(Query())
    base = request_handler._loaded._base
    assert "this device allows 1 to 32" in str(device.ask(evaluate(base, timesteps=33)))
    (device_files("pi").folder / "policy.toml").write_text("max_timesteps = 2\n")
    assert "this device allows 1 to 2" in str(device.ask(evaluate(base, timesteps=3)))
    assert isinstance(device.ask(evaluate(base, timesteps=2)), Evaluation)


def test_memory_is_the_owners_or_a_fixed_share(device, monkeypatch):
    granted, budget = [], request_handler.budget

    def spied(gib, where):
        granted.append(gib)
        return budget(gib, where)

    monkeypatch.setattr(request_handler, "budget", spied)
    monkeypatch.setattr(request_handler, "_check_free", lambda *_: None)
    device.ask(Query())
    device.stated.pop("memory-gib")
    device.ask(Query())
    assert granted == [0.25, None]
