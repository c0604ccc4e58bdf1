"""SCAFFOLD on a device: its own control variate, kept from round to round (`models.lora.scaffold`).

c_i is made of what the device sent, of what the server sent, and of nothing else. Under privacy of examples that is a
release already, and c − c_i is added to gradients after clip and noise: it costs nothing. As with what rounding left, a
variate of open rounds never enters a private one (`client.rounds.upload.compatibility_key`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from client.device import Device
from client.rounds.upload import PreparedUpload, compatibility_key, decode_change
from client.store.store import ControlVariateState
from models.lora.adapter import Adapter, Factors
from models.lora.scaffold import ControlVariate, control_delta
from models.lora.trainable import from_trained_tensors
from protocol.messages import TrainingPlan
from protocol.tensor_codec import CodecError


def own(plan: TrainingPlan, device: Device, server: Mapping[str, Tensor], *, release: bool) -> ControlVariate:
    """c_i at the start of this round, of the shapes of c: zero before the first; what it was if it is done again."""
    found: ControlVariate = {}
    if known := device.store.variate(compatibility_key(plan, release)):
        found = known.before if known.round == plan.round else known.after
    if {name: part.shape for name, part in found.items()} == {name: part.shape for name, part in server.items()}:
        return found
    return {name: part.new_zeros(part.shape) for name, part in server.items()}


def correction(
    plan: TrainingPlan,
    server: Mapping[str, Tensor],
    mine: Mapping[str, Tensor],
    start: Adapter,
    lora_xs_bases: Adapter | None,
) -> Adapter:
    """c − c_i, as a job has it; zero where nothing is shared, as at a B that is the device's own."""
    added = {name: part - mine[name] for name, part in server.items()}
    nothing = {name: Factors(*map(torch.zeros_like, factors)) for name, factors in start.items()}
    return from_trained_tensors(added, plan.trains, nothing, lora_xs_bases)


def keep(
    plan: TrainingPlan,
    device: Device,
    server: Mapping[str, Tensor],
    mine: ControlVariate,
    goes: PreparedUpload,
    start: ControlVariate,
    *,
    release: bool,
) -> None:
    """c_i⁺, now that these bytes are the reply: of what the server will read in them, so that both mean the same."""
    try:
        moved = decode_change(plan, goes.data, start)
    except CodecError:
        return  # it was not finite: nobody will use it
    found = control_delta(server, moved, steps=plan.steps, rate=plan.learning_rate)
    after = {name: (mine[name].double() + part).float() for name, part in found.items()}
    device.store.save_variate(ControlVariateState(compatibility_key(plan, release), plan.round, mine, after))
