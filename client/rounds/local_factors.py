"""The factor B that stays on a device and is its own, where A alone is shared.

FedSA-LoRA (Guo et al., 2025, arXiv:2410.01463): what A learns is common, what B learns is the device's. Both are
trained, under the same clip and noise if there are any, and A goes up. Without its B a device has no use of A, so it
measures, draws and personalises with both.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from client.device import Device
from client.store.store import LocalFactors
from models.lora.adapter import Adapter
from protocol.messages import TrainingPlan


def initial_local_factors(plan: TrainingPlan, device: Device, release: bool) -> dict[str, Tensor]:
    """B by site as a round of this plan starts from it: of a round that is done again, as it did before."""
    kept = device.store.own(_run(plan.run, plan.base))
    if kept is None or kept.promise != _promise(plan.privacy is not None, release):
        return {}
    return kept.before if kept.round == plan.round else kept.after


def updated_local_factors(
    plan: TrainingPlan, before: dict[str, Tensor], trained: Adapter, release: bool
) -> LocalFactors:
    """What a round leaves: the device's B after it, at sites that it did not train as before it; and before it."""
    after = before | {name: factors.b for name, factors in trained.items()}
    promise = _promise(plan.privacy is not None, release)
    return LocalFactors(_run(plan.run, plan.base), promise, plan.round, after, before)


def with_local_factors(adapter: Adapter, run: str, device: Device) -> Adapter:
    """An adapter of a run with the B that the device has of it; as it is, if it has none."""
    return _with_kept(adapter, device.store.own(_run(run, device.report.base)))


def with_private_local_factors(adapter: Adapter, run: str, device: Device, *, release: bool) -> Adapter:
    """The same for what is told with noise: with the B of private rounds alone, whose noise was as real.

    Any other B is a function of every picture that nothing bounds, and one of them would change every gain.
    """
    kept = device.store.own(_run(run, device.report.base))
    return _with_kept(adapter, kept if kept and kept.promise == _promise(True, release) else None)


def _with_kept(adapter: Adapter, kept: LocalFactors | None) -> Adapter:
    return replace_b(adapter, kept.after) if kept else adapter


def replace_b(adapter: Adapter, own: dict[str, Tensor]) -> Adapter:
    """The adapter with the device's B wherever there is one of its shape."""
    return {
        name: factors._replace(b=own[name]) if name in own and own[name].shape == factors.b.shape else factors
        for name, factors in adapter.items()
    }


def _run(run: str, base: str) -> str:
    return hashlib.sha256(repr((run, base)).encode()).hexdigest()


def _promise(private: bool, release: bool) -> str:
    """What B was trained under: nothing that was not noised, or by simulated noise, enters a round that promises."""
    return f"{'private' if private else 'open'}, {'release' if release else 'simulated'}"
