"""What goes up of a round: what was trained as it is, or its change, rounded, with what rounding left of the last one.

Rounding comes after the noise. Under privacy of examples the change, and so all that is left of it, is made of what is
noised and charged already, of what the server sent, and of coins: post-processing, which costs nothing. Nothing that
was left of an open round ever enters a private one, nor what was left by simulated noise a release (`compatibility_key`). Where
the server promises privacy per device, its clip bounds what comes (`strategies.central_dp`).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from client.device import Device
from client.rounds.local_factors import updated_local_factors
from client.store.store import LocalFactors, Residual
from common.seeding import derive_seed
from models.lora.adapter import Adapter
from models.lora.trainable import trained_tensors
from privacy.ledger.entries import TRAIN, LedgerHistory
from protocol import quantization, tensor_codec
from protocol.messages import TrainingPlan

ROUNDING = "rounding"


class PreparedUpload(NamedTuple):
    """The bytes of a reply, and what is to be kept once they are the ones that are sent."""

    data: bytes
    residual: Residual | None
    own: LocalFactors | None


def prepare_upload(
    plan: TrainingPlan,
    device: Device,
    *,
    start: Adapter,
    trained: Adapter,
    lora_xs_bases: Adapter | None,
    own: dict[str, Tensor] | None,
    history: LedgerHistory,
    release: bool,
) -> PreparedUpload:
    """What a device sends of an adapter that it trained from `start`: the same bytes whenever it is asked.

    Args:
        own: the factors B that the device began the round with, where they are its own.
        history: the device's ledger, with this round in it.
        release: whether the noise, if there is any, was no simulation.
    """
    after = trained_tensors(trained, plan.trains, lora_xs_bases)
    stays = None if own is None else updated_local_factors(plan, own, trained, release)
    if plan.update == "fp32":
        return PreparedUpload(tensor_codec.encode(after), None, stays)
    before = trained_tensors(start, plan.trains, lora_xs_bases)
    change = {name: tensor - before[name] for name, tensor in after.items()}
    common = compatibility_key(plan, release)
    carried = _carried(device.store.residual(common), plan, history) if plan.feedback else {}
    if _shapes(carried) == _shapes(change):
        change = {name: tensor + carried[name] for name, tensor in change.items()}
    coins = torch.Generator().manual_seed(derive_seed(device.seed, device.name, plan.run, plan.round, ROUNDING))
    data = quantization.encode(change, plan.update, coins, keep=plan.keep)
    if not plan.feedback:
        return PreparedUpload(data, None, stays)
    # A private reply is sealed, and never made again.
    again = {} if plan.privacy else carried
    return PreparedUpload(data, Residual(common, plan.round, _left(change, data, plan), again), stays)


def keep(device: Device, sent: PreparedUpload) -> None:
    """Keep what is for the next round, now that these bytes are the reply."""
    if sent.residual:
        device.store.save_residual(sent.residual)
    if sent.own:
        device.store.save_local_factors(sent.own)


def decode_change(plan: TrainingPlan, data: bytes, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the receiver reads of a reply as its change from `start`.

    Raises CodecError for one that it will refuse.
    """
    if plan.update == "fp32":
        return {name: tensor - start[name] for name, tensor in tensor_codec.decode(data, _shapes(start)).items()}
    return quantization.decode(data, _shapes(start), plan.update, keep=plan.keep)


def compatibility_key(plan: TrainingPlan, release: bool) -> str:
    """What two rounds have in common if what is left of one may enter the next."""
    trained = (plan.base, plan.rank, plan.trains, plan.sites)
    common = (plan.run, *trained, plan.privacy is None, release)
    return hashlib.sha256(repr(common).encode()).hexdigest()


def _carried(kept: Residual | None, plan: TrainingPlan, history: LedgerHistory) -> dict[str, Tensor]:
    """What is to be added to this round's change: what the round before it left, and nothing a second time.

    A round that is done again gets what it got. One that was charged for after the residual was kept, and left none,
    may have sent it: a crash came between the two. Then, or if the server has gone back, it is forgotten.
    """
    if kept is None:
        return {}
    if kept.round == plan.round:
        return kept.carried
    earlier = (number for run, number, kind in history.entries if run == plan.run and kind == TRAIN)
    last = max((number for number in earlier if number < plan.round), default=None)
    return kept.left if kept.round == last else {}


def _left(change: dict[str, Tensor], data: bytes, plan: TrainingPlan) -> dict[str, Tensor]:
    """What the receiver won't read of the change; nothing if it will refuse all of it, which was not finite."""
    try:
        read = quantization.decode(data, _shapes(change), plan.update, keep=plan.keep)
    except tensor_codec.CodecError:
        return {}
    return {name: tensor - read[name] for name, tensor in change.items()}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tensor_codec.Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
