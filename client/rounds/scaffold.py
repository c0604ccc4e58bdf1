"""SCAFFOLD on a device: its control variate c_i, stored from round to round (`models.lora.scaffold`).

c_i depends only on the device's uploads and the server's messages. Under example-level privacy the upload is a release
already, and c − c_i is added to gradients after clipping and noise, so it costs nothing. As for quantization residuals,
a variate of non-private rounds never enters a private one (`client.rounds.upload.compatibility_key`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from client.device import Device
from client.rounds.upload import PreparedUpload, compatibility_key, decode_change
from client.store.round_state import ControlVariateState
from models.lora.adapter import Adapter, Factors
from models.lora.scaffold import ControlVariate, control_delta
from models.lora.trainable import from_trained_tensors
from protocol.messages import TrainingPlan
from protocol.tensor_codec import CodecError


def load_variate(plan: TrainingPlan, device: Device, server: Mapping[str, Tensor], *, release: bool) -> ControlVariate:
    """Return c_i at the start of this round: zero before the first round, and the same again if the round is repeated.

    Args:
        plan: the round's plan.
        device: the device that trains.
        server: the server's control variate c, by tensor name.
        release: whether the noise, if any, is secure rather than simulated.
    """
    variate: ControlVariate = {}
    if stored := device.store.variate(compatibility_key(plan, release)):
        variate = stored.before if stored.round == plan.round else stored.after
    if {name: part.shape for name, part in variate.items()} == {name: part.shape for name, part in server.items()}:
        return variate
    return {name: part.new_zeros(part.shape) for name, part in server.items()}


def correction(
    plan: TrainingPlan,
    server: Mapping[str, Tensor],
    variate: Mapping[str, Tensor],
    start: Adapter,
    lora_xs_bases: Adapter | None,
) -> Adapter:
    """Return c − c_i in the form of an adapter; zero for factors that are not shared, such as a local B.

    Args:
        plan: the round's plan.
        server: the server's control variate c, by tensor name.
        variate: the device's control variate c_i, by tensor name.
        start: the adapter before training, for the shapes.
        lora_xs_bases: the frozen bases, if cores are trained.
    """
    difference = {name: part - variate[name] for name, part in server.items()}
    zero = {name: Factors(*map(torch.zeros_like, factors)) for name, factors in start.items()}
    return from_trained_tensors(difference, plan.trains, zero, lora_xs_bases)


def save_variate(
    plan: TrainingPlan,
    device: Device,
    server: Mapping[str, Tensor],
    variate: ControlVariate,
    upload: PreparedUpload,
    start: ControlVariate,
    *,
    release: bool,
) -> None:
    """Store the updated variate c_i⁺, now that `upload` is the reply.

    It is computed from the change as the server will decode it, so that both sides agree.

    Args:
        plan: the round's plan.
        device: the device that trained.
        server: the server's control variate c, by tensor name.
        variate: the device's control variate c_i before the round.
        upload: the upload of this round.
        start: the trained tensors before training, by name.
        release: whether the noise, if any, was secure rather than simulated.
    """
    try:
        sent_change = decode_change(plan, upload.data, start)
    except CodecError:
        return  # non-finite: the server rejects it
    delta = control_delta(server, sent_change, steps=plan.steps, rate=plan.learning_rate)
    after = {name: (variate[name].double() + part).float() for name, part in delta.items()}
    device.store.save_variate(ControlVariateState(compatibility_key(plan, release), plan.round, variate, after))
