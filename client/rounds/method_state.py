"""Adapters that a method of personalization trains in the rounds, and that stay on the device.

Such an adapter is a function of every picture, without a bound. It therefore enters rounds without a guarantee on the
device only: a private round neither reads nor writes it, and refuses the method before (`client.rounds.train`).
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from client.device import Device
from client.store.round_state import MethodState
from models.lora.adapter import Adapter, adapter_shapes, from_tensors, rank, to_tensors
from protocol.messages import PersonalizationMethod, TrainingPlan


def state_before_round(plan: TrainingPlan, device: Device) -> Adapter | None:
    """Return the state at the start of a round; a repeated round starts from the same one again.

    Args:
        plan: the round's plan.
        device: the device that trains.
    """
    if plan.personalization is None or plan.privacy:
        return None
    stored = device.store.method_state(_key(plan.run, plan.personalization, device))
    if stored is None:
        return None
    return _adapter(stored.before if stored.round == plan.round else stored.after, device)


def save_state_after_round(plan: TrainingPlan, device: Device, before: Adapter | None, after: Adapter | None) -> None:
    """Store the state of a round, unless the method has none.

    Args:
        plan: the round's plan.
        device: the device that trained.
        before: state at the start of the round.
        after: state at its end.
    """
    if plan.personalization is None or plan.privacy or after is None:
        return
    key = _key(plan.run, plan.personalization, device)
    device.store.save_method_state(MethodState(key, plan.round, to_tensors(before or {}), to_tensors(after)))


def state_after_rounds(run: str, method: PersonalizationMethod, device: Device) -> Adapter | None:
    """Return the state that the last round of a run left.

    Args:
        run: the run's id.
        method: the method with its options.
        device: the device that personalizes.
    """
    stored = device.store.method_state(_key(run, method, device))
    return _adapter(stored.after, device) if stored else None


def _key(run: str, method: PersonalizationMethod, device: Device) -> str:
    """Name the rounds that a state belongs to: one run, base and method, with its options, such as the rank."""
    return hashlib.sha256(repr((run, device.report.base, method)).encode()).hexdigest()


def _adapter(tensors: dict[str, Tensor], device: Device) -> Adapter | None:
    """Return the adapter; None if there is none, or if it doesn't fit the device's sites."""
    try:
        adapter = from_tensors(tensors)
        expected = adapter_shapes({name: device.sites[name] for name in adapter}, rank(adapter))
    except KeyError:
        return None
    fits = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    return adapter if adapter and fits else None
