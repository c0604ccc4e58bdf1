"""A strategy under Flower's own loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord

from models.lora.adapter import to_tensors
from protocol import records
from protocol.tensor_codec import encode
from server.rounds.loop import run_rounds
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.fedit import FedIT
from strategies.server_optimizers import FedAvgM
from tests.helpers.fleet import FakeDevice, fresh_state, handle, perform, strategy


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def test_loop_of_flower_equals_ours(tmp_path: Path) -> None:
    """Also with a server optimizer, whose moments are kept between rounds."""

    def make_parts():
        grid = CohortGrid([FakeDevice(name) for name in "abc"], perform)
        return grid, strategy(aggregation=FedIT(), server_optimizer=FedAvgM(lr=0.5, momentum=0.9))

    grid, ours = make_parts()
    state = run_rounds(
        grid=grid, strategy=ours, state=fresh_state(), rounds=3, checkpoints=tmp_path, on_round=lambda _: None
    )
    grid, flowers = make_parts()
    arrays = records.adapter_to_record(encode(to_tensors(fresh_state().adapter)))
    result = flowers.start(grid, arrays, num_rounds=3)
    final = flowers.format.decode(records.adapter_from_record(result.arrays))
    for name, tensor in to_tensors(state.adapter).items():
        assert torch.equal(to_tensors(final)[name], tensor)
    assert not torch.equal(final["x"].b, fresh_state().adapter["x"].b)
    assert result.evaluate_metrics_clientapp[3]["shared"] == state.history[-1].validation.shared


def test_round_is_aggregated_once() -> None:
    grid, federated = CohortGrid([FakeDevice("a")], perform), strategy()
    arrays = records.adapter_to_record(encode(to_tensors(fresh_state().adapter)))
    replies = list(grid.send_and_receive(federated.configure_train(1, arrays, ConfigRecord(), grid)))
    federated.aggregate_train(1, replies)
    with pytest.raises(ValueError, match="once per round"):
        federated.aggregate_train(1, replies)
