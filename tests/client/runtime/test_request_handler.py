"""A server's messages can't override the owner's choice of base, memory and throttle."""

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


class WorkerDevice:
    """A device with a tiny base and settable sensors that count their readings."""

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
        self.resources.throttle._fresh_until = float("-inf")  # reads the sensors again
        return request_handler.answer(request, self.stated, resources=self.resources)


@pytest.fixture
def loads(monkeypatch):
    """Return the folders that were loaded."""
    result, load = [], request_handler.load

    def counted(path, **options):
        result.append(path)
        return load(path, **options)

    monkeypatch.setattr(request_handler, "load", counted)
    request_handler._loaded.unload()
    yield result
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
    with open_store(device_files("pi")) as files:
        yield WorkerDevice(node, pipeline_folder, files.store)


def evaluate(base, **more):
    return Evaluate(run="r", round=1, adapter=encode(to_tensors(init_adapter(base.sites, 1, 0))), **more)


def test_alternating_sites_load_base_once(device, loads):
    for sites in (ONE, OTHER, ONE, None, OTHER):
        assert isinstance(device.ask(Query(adapted=sites)), DeviceReport)
        base = request_handler._loaded._base
        assert sites is None or set(base.sites) == set(sites)
    assert len(loads) == 1
    assert isinstance(device.ask(replace(evaluate(base), adapted=OTHER)), Evaluation)  # at the requested layers


@pytest.mark.parametrize("sites", [("nowhere",), ("",), (*ONE, *ONE), ("(.*.*)*!",), ("${oc.env:HOME}",)])
def test_sites_are_names(device, sites):
    response = device.ask(Query(adapted=sites))
    assert isinstance(response, RequestRefusedError)


def test_query_does_no_work_while_throttled(device, loads):
    device.now = [LOW]
    assert isinstance(device.ask(Query()), Cancelled)
    assert not loads
    device.now = [GOOD]
    device.ask(Query())
    device.now = [LOW]
    report = device.ask(Query())
    assert (report.charging, report.battery) == (False, 0.0)  # a loaded base needs no work
    assert isinstance(device.ask(Query(adapted=OTHER)), Cancelled)


def test_no_request_starts_while_throttled(device):
    device.ask(Query())
    request = evaluate(request_handler._loaded._base)
    device.now = [LOW]
    response = device.ask(request)
    assert isinstance(response, Cancelled)
    assert not device.resources.store.ledger.entries()  # nothing was charged


@pytest.mark.integration
def test_throttle_stops_any_work(device, monkeypatch):
    """Wherever the charger is disconnected, encoding and measuring end there, without a reply."""
    device.ask(Query())
    request = evaluate(request_handler._loaded._base)
    device.resources.store.examples = lambda *_: None  # no cache, so that pictures are encoded
    throttle = device.resources.throttle
    monkeypatch.setattr("client.runtime.throttle.interval", lambda _: -1.0)  # every check reads the sensors

    def outcome_and_readings(pulled_at):
        """Return the outcome, and the number of sensor readings until then."""
        reads = count()
        throttle._read = lambda: LOW if next(reads) >= pulled_at else GOOD
        return device.ask(request), next(reads)

    assert isinstance(outcome_and_readings(pulled_at=1000)[0], Evaluation)  # fills the caches
    reply, total = outcome_and_readings(pulled_at=1000)
    assert isinstance(reply, Evaluation)
    assert total >= 7  # checks: request, encoding, a picture and its two passes, measuring and its pass
    for number in range(total):
        result, _ = outcome_and_readings(pulled_at=number)
        assert isinstance(result, Cancelled), number


def test_timesteps_are_bounded_by_policy(device):
    device.ask(Query())
    base = request_handler._loaded._base
    assert "this device allows 1 to 32" in str(device.ask(evaluate(base, timesteps=33)))
    (device_files("pi").folder / "policy.toml").write_text("max_timesteps = 2\n")
    assert "this device allows 1 to 2" in str(device.ask(evaluate(base, timesteps=3)))
    assert isinstance(device.ask(evaluate(base, timesteps=2)), Evaluation)


def test_memory_is_configured_or_fixed_fraction(device, monkeypatch):
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
