"""Every path gives the same reply to a request: Flower's ClientApp and the in-process grid, batched or not."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from PIL import Image

from client.device import from_config
from client.runtime.client_app import app
from models.lora.adapter import init_adapter, to_tensors
from protocol import records
from protocol.messages import Evaluate, ExamplePrivacy, Personalize, Query, Train, TrainingPlan
from protocol.tensor_codec import encode
from simulations.grid.cohort import CohortGrid
from training.engine import perform

PRIVACY = ExamplePrivacy(noise_multiplier=2.0, clip=0.1, sampling_rate=0.5, draws=2, delta=1e-3)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Create folders of two owners with six pictures each."""
    root = tmp_path_factory.mktemp("owners")
    random = np.random.default_rng(0)
    for owner in "ab":
        (root / owner).mkdir()
        lines = []
        for k in range(6):
            Image.fromarray(random.integers(0, 256, (16, 16), dtype=np.uint8)).save(root / owner / f"{k}.png")
            lines.append(json.dumps({"file_name": f"{k}.png", "text": f"{owner} {k}"}))
        (root / owner / "metadata.jsonl").write_text("\n".join(lines))
    return root


def requests(base):
    adapter, sites = encode(to_tensors(init_adapter(base.sites, 4, seed=0))), tuple(base.sites)
    plan = TrainingPlan(run="r", round=1, base=base.hash, rank=2, steps=2, batch_size=2, learning_rate=1e-2)
    return [
        Query(adapted=sites),
        Train(plan=plan, adapter=adapter, adapted=sites),
        Evaluate(run="r", round=1, adapter=adapter, adapted=sites, timesteps=2),
        Personalize(
            run="r",
            round=2,
            adapter=adapter,
            rank=2,
            steps=2,
            batch_size=2,
            learning_rate=1e-2,
            look_every=1,
            patience=1,
            adapted=sites,
            timesteps=2,
        ),
        Train(plan=replace(plan, run="private", round=3, privacy=PRIVACY), adapter=adapter, adapted=sites),
    ]


def node_config(pictures, folder, owner):
    """Return the configuration of a test device."""
    private = {"data": str(pictures / owner), "name": owner, "store": str(folder / owner), "test": True}
    return private | {"partition-id": 0}


def by_grid(base, pictures, folder, *, batched):
    replies = []
    work = partial(perform, base, memory=2**28, timesteps=2)
    for request in requests(base):
        if isinstance(request, Train) and request.plan.privacy:
            shutil.rmtree(folder)  # an ε can't follow an update without noise
        devices = [from_config(node_config(pictures, folder, owner), base) for owner in "ab"]
        grid = CohortGrid(devices, work, batched=batched)
        messages = [
            Message(records.request_to_records(request), node, records.message_type(request)) for node in (1, 2)
        ]
        replies += grid.send_and_receive(messages)
    return replies


def by_app(base, pictures, folder, pipeline_folder):
    replies = []
    hostile = "adapter.sites='(.*.*)*!' trainer.memory_gib=9999 hydra.searchpath=[file:///] seed=${oc.env:HOME}"
    for request in requests(base):
        if isinstance(request, Train) and request.plan.privacy:
            shutil.rmtree(folder)
        for node, owner in enumerate("ab", start=1):
            message = Message(records.request_to_records(request), node, records.message_type(request))
            config = node_config(pictures, folder, owner) | {"device": "cpu", "base": str(pipeline_folder)}
            context = Context(1, node, config | {"memory-gib": 0.25}, RecordDict(), {"overrides": hostile})
            replies.append(app(message, context))
    return replies


def read(message):
    assert message.has_content(), message.error
    return records.reply_from_records(message.metadata.message_type, message.content)


def near(one, other):
    """Check equality up to the rounding of sums in another order."""
    assert type(one) is type(other)
    for name, value in vars(one).items():
        expected = vars(other)[name]
        if isinstance(value, bytes):
            header = int.from_bytes(value[:8], "little") + 8
            assert value[:header] == expected[:header]
            values, expected_values = (np.frombuffer(data[header:], np.float32) for data in (value, expected))
            assert np.linalg.norm(values - expected_values) <= 1e-3 * np.linalg.norm(
                expected_values
            )  # Adam magnifies tiny gradients
        elif isinstance(value, float):
            assert value == pytest.approx(expected, rel=1e-4)
        else:
            assert value == expected


@pytest.mark.integration
def test_all_paths_give_equal_replies(base, pictures, pipeline_folder, tmp_path, monkeypatch):
    def new_folder(name):
        """Return a folder for stores and the heads of their ledgers, so that both are removed together."""
        monkeypatch.setenv("ANTHER_HOME", str(tmp_path / name / "home"))
        return tmp_path / name

    serial = by_grid(base, pictures, new_folder("serial"), batched=False)
    assert len(serial) == 10
    cohort = by_grid(base, pictures, new_folder("cohort"), batched=True)
    flower = by_app(base, pictures, new_folder("flower"), pipeline_folder)
    for one, two, three in zip(serial, cohort, flower, strict=True):
        near(read(one), read(two))
        near(read(one), read(three))


def test_errors_reveal_nothing_about_the_device(pictures, tmp_path, pipeline_folder):
    CohortGrid([], lambda _: [])  # sets what Message needs
    message = Message(records.request_to_records(Query()), 1, "query")
    node = node_config(pictures, tmp_path, "secret") | {
        "test": "perhaps",
        "device": "cpu",
        "base": str(pipeline_folder),
    }
    reply = app(message, Context(1, 1, node, RecordDict(), {}))
    assert reply.error.code == 2
    assert "secret" not in reply.error.reason
    assert reply.error.reason == "failed, see the device's own log"
