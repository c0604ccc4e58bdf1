"""Prepare a round's upload: the trained tensors, or their quantized change with error feedback.

Quantization happens after the noise. Under example-level privacy, the change and therefore its residual depend only on
values that are noised and charged already, on the server's messages, and on random bits. This is post-processing and
costs nothing. The residual of a non-private round never enters a private one, and one of simulated noise never enters a
release (`compatibility_key`). If the server guarantees device-level privacy, its clipping bounds the upload
(`strategies.central_dp`).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from client.device import Device
from client.rounds.local_factors import updated_local_factors
from client.store.round_state import LocalFactors, Residual
from common.seeding import derive_seed
from models.lora.adapter import Adapter
from models.lora.trainable import trained_tensors
from privacy.ledger.entries import TRAIN, LedgerHistory
from protocol import quantization, tensor_codec
from protocol.messages import TrainingPlan

ROUNDING = "rounding"  # name of a random stream; changing it changes results


class PreparedUpload(NamedTuple):
    """The bytes of a reply, and the state to store once these bytes are the reply."""

    data: bytes
    residual: Residual | None
    local_factors: LocalFactors | None


def prepare_upload(
    plan: TrainingPlan,
    device: Device,
    *,
    start: Adapter,
    trained: Adapter,
    lora_xs_bases: Adapter | None,
    local_b: dict[str, Tensor] | None,
    history: LedgerHistory,
    release: bool,
) -> PreparedUpload:
    """Encode a trained adapter for upload; repeated calls for one round give the same bytes.

    Args:
        plan: the round's plan.
        device: the device that trained.
        start: the adapter before training; A is `[rank, in]`, B is `[out, rank]`.
        trained: the adapter after training.
        lora_xs_bases: the frozen bases, if cores were trained.
        local_b: the local factors B at the start of the round, if B stays on the device.
        history: the device's ledger, including this round.
        release: whether the noise, if any, was secure rather than simulated.
    """
    after = trained_tensors(trained, plan.trains, lora_xs_bases)
    local_factors = None if local_b is None else updated_local_factors(plan, local_b, trained, release)
    if plan.update == "fp32":
        return PreparedUpload(tensor_codec.encode(after), None, local_factors)
    before = trained_tensors(start, plan.trains, lora_xs_bases)
    change = {name: tensor - before[name] for name, tensor in after.items()}
    key = compatibility_key(plan, release)
    carried = _carried(device.store.residual(key), plan, history) if plan.feedback else {}
    if _shapes(carried) == _shapes(change):
        change = {name: tensor + carried[name] for name, tensor in change.items()}
    rng = torch.Generator().manual_seed(derive_seed(device.seed, device.name, plan.run, plan.round, ROUNDING))
    data = quantization.encode(change, plan.update, rng, keep=plan.keep)
    if not plan.feedback:
        return PreparedUpload(data, None, local_factors)
    # A private reply is sealed and never computed again.
    repeated = {} if plan.privacy else carried
    return PreparedUpload(
        data, Residual(key, plan.round, _quantization_error(change, data, plan), repeated), local_factors
    )


def save_round_state(device: Device, upload: PreparedUpload) -> None:
    """Store the state for the next round, now that these bytes are the reply."""
    if upload.residual:
        device.store.save_residual(upload.residual)
    if upload.local_factors:
        device.store.save_local_factors(upload.local_factors)


def decode_change(plan: TrainingPlan, data: bytes, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the change from `start` as the receiver will decode it.

    Args:
        plan: the round's plan.
        data: the uploaded bytes.
        start: the tensors before training, by name.

    Raises:
        CodecError: the receiver will reject the bytes.
    """
    if plan.update == "fp32":
        return {name: tensor - start[name] for name, tensor in tensor_codec.decode(data, _shapes(start)).items()}
    return quantization.decode(data, _shapes(start), plan.update, keep=plan.keep)


def compatibility_key(plan: TrainingPlan, release: bool) -> str:
    """Return the hash that two rounds must share for the residual of one to enter the other."""
    trained = (plan.base, plan.rank, plan.trains, plan.sites)
    common = (plan.run, *trained, plan.privacy is None, release)
    return hashlib.sha256(repr(common).encode()).hexdigest()


def _carried(stored: Residual | None, plan: TrainingPlan, history: LedgerHistory) -> dict[str, Tensor]:
    """Return the residual to add to this round's change; each residual is used once.

    A repeated round gets the same residual again. If a round was charged after the residual was stored and stored none
    itself, it may have been sent before a crash. In that case, and if the server was rolled back, the residual is
    discarded.
    """
    if stored is None:
        return {}
    if stored.round == plan.round:
        return stored.carried
    earlier = (number for run, number, kind in history.entries if run == plan.run and kind == TRAIN)
    last = max((number for number in earlier if number < plan.round), default=None)
    return stored.left if stored.round == last else {}


def _quantization_error(change: dict[str, Tensor], data: bytes, plan: TrainingPlan) -> dict[str, Tensor]:
    """Return the part of the change that decoding loses; empty if the receiver rejects all of it as non-finite."""
    try:
        decoded = quantization.decode(data, _shapes(change), plan.update, keep=plan.keep)
    except tensor_codec.CodecError:
        return {}
    return {name: tensor - decoded[name] for name, tensor in change.items()}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tensor_codec.Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
