"""Fake devices without a base, which reply immediately and can misbehave, for tests of the server side."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common.seeding import derive_seed
from models.lora.adapter import Factors, Site, adapter_shapes, from_tensors, init_adapter, select_sites, split_rank
from models.lora.lora_xs import bases_from_tensors, to_tensors_with_bases, zero_adapter
from models.lora.trainable import trained_tensors
from protocol import messages, quantization
from protocol.messages import DeviceReport, TrainingPlan
from protocol.tensor_codec import decode, encode
from server.rounds.state import RunState
from strategies.aggregation.exact import Exact
from strategies.flower_strategy import FlowerStrategy
from strategies.planning.plan import PlanLimits
from strategies.selection.everyone import Everyone
from tests.helpers.strategies import make_strategy

SITES = {"x": Site(6, 5), "y": Site(4, 7)}
PLAN = TrainingPlan(run="run", round=0, base="base", rank=3, steps=2, batch_size=4, learning_rate=0.1)
REPORT = DeviceReport(
    device="",
    base="base",
    profile="p",
    memory_gib=4.0,
    examples_per_second=2.0,
    watts=5.0,
    uplink_mbps=8.0,
    downlink_mbps=8.0,
)


def bases_file(folder: Path) -> Path:
    """Write fixed factors of LoRA-XS for these sites, and return the file."""

    def columns(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, PLAN.rank, generator=generator)).Q.contiguous()

    generator = torch.Generator().manual_seed(0)
    lora_xs_bases = {
        name: Factors(columns(site.inputs).T.contiguous(), columns(site.outputs)) for name, site in SITES.items()
    }
    tensors = to_tensors_with_bases(zero_adapter(lora_xs_bases), lora_xs_bases)
    save_file({name: part for name, part in tensors.items() if "lora_B" not in name}, folder / "frame.safetensors")
    return folder / "frame.safetensors"


@dataclass
class FakeDevice:
    """Device whose update adds noise seeded by its name and round; its loss decreases with the rounds."""

    name: str
    report: Any = None
    misbehave: Callable[[Any], Any] | None = None
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.report = self.report or replace(REPORT, device=self.name)


def handle(request: Any, device: FakeDevice) -> Generator[Any, Any, Any]:
    """Replace `client.rounds.handler.handle`: one job for each request except queries."""
    device.requests.append(type(request).__name__)
    if isinstance(request, messages.Query):
        return device.report
    yield (device.name, type(request).__name__)
    reply = _reply(request, device)
    return device.misbehave(reply) if device.misbehave else reply


def perform(jobs: list[Any]) -> list[Any]:
    return [0.0 for _ in jobs]


def _reply(request: Any, device: FakeDevice) -> Any:
    match request:
        case messages.Train(plan=plan):
            cores = plan.trains == "cores"
            tensors = decode(request.adapter, adapter_shapes(SITES, -1, with_bases=cores))
            lora_xs_bases = bases_from_tensors(tensors) if cores else None
            sent = from_tensors(tensors)
            generator = torch.Generator().manual_seed(derive_seed(device.name, plan.round))
            head, _ = split_rank(sent if plan.sites is None else select_sites(sent, plan.sites), plan.rank)
            moved = {
                site: Factors(*(part + 0.1 * torch.randn(part.shape, generator=generator) for part in factors))
                for site, factors in head.items()
            }
            after = trained_tensors(moved, plan.trains, lora_xs_bases)
            data = encode(after)
            if plan.update != "fp32":
                before = trained_tensors(head, plan.trains, lora_xs_bases)
                change = {name: part - before[name] for name, part in after.items()}
                data = quantization.encode(change, plan.update, generator, keep=plan.keep)
            return messages.Update(
                device=device.name,
                run=plan.run,
                round=plan.round,
                rank=plan.rank,
                adapter=data,
                release=False,
                seconds=float(len(device.name)),
                joules=2.0,
                quality="estimate",
                loss=None if plan.privacy else 0.5,
                epsilon=1.5 if plan.privacy else None,
                events=3,
            )
        case messages.Evaluate(privacy=messages.EvaluationPrivacy()):
            return messages.Evaluation(
                device=device.name,
                round=request.round,
                base=None,
                shared=None,
                gain=0.1 * len(device.name),
                release=False,
                epsilon=2.0,
            )
        case messages.Evaluate():
            return messages.Evaluation(
                device=device.name, round=request.round, base=1.0, shared=1.0 / (1 + request.round)
            )
        case messages.Personalize():
            return messages.Personalized(device=device.name, seconds=3.0, joules=4.0, quality="estimate")
    raise AssertionError(request)


def strategy(**changes: Any) -> FlowerStrategy:
    settings: dict[str, Any] = {
        "plan": PLAN,
        "sites": SITES,
        "aggregation": Exact(rank=PLAN.rank, max_rank=None, seed=0),
        "selection": Everyone(),
        "limits": PlanLimits(),
    }
    return make_strategy(**settings | changes)


def fresh_state(*, private: bool = False) -> RunState:
    return RunState.start(run="run", private=private, adapter=init_adapter(SITES, PLAN.rank, seed=0))
