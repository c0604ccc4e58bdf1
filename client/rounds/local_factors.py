"""Local factors B, which stay on the device while only the factors A are shared.

FedSA-LoRA (Guo et al., 2025, arXiv:2410.01463): A learns the common part, B the device-specific part.
Both are trained, under the same clipping and noise if there is any, and only A is uploaded. A is of no use without its
B, so the device evaluates, draws and personalizes with both.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from client.device import Device
from client.store.round_state import LocalFactors
from models.lora.adapter import Adapter
from protocol.messages import TrainingPlan


def initial_local_factors(plan: TrainingPlan, device: Device, release: bool) -> dict[str, Tensor]:
    """Return B, `[out, rank]` by site, at the start of this round; a repeated round starts from the same B again.

    Args:
        plan: the round's plan.
        device: the device that trains.
        release: whether the noise, if any, is secure rather than simulated.
    """
    stored = device.store.local_factors(_run(plan.run, plan.base))
    if stored is None or stored.promise != _promise(plan.privacy is not None, release):
        return {}
    return stored.before if stored.round == plan.round else stored.after


def updated_local_factors(
    plan: TrainingPlan, before: dict[str, Tensor], trained: Adapter, release: bool
) -> LocalFactors:
    """Return the state to store after a round: B after and before it; untrained sites are unchanged.

    Args:
        plan: the round's plan.
        before: factors B at the start of the round, by site.
        trained: the adapter after training.
        release: whether the noise, if any, was secure rather than simulated.
    """
    after = before | {name: factors.b for name, factors in trained.items()}
    promise = _promise(plan.privacy is not None, release)
    return LocalFactors(_run(plan.run, plan.base), promise, plan.round, after, before)


def with_local_factors(adapter: Adapter, run: str, device: Device) -> Adapter:
    """Return the run's adapter with the device's own B, if the device has one.

    Args:
        adapter: the received adapter; A is `[rank, in]`, B is `[out, rank]`.
        run: the run's id.
        device: the device that evaluates or trains.
    """
    return _with_stored(adapter, device.store.local_factors(_run(run, device.report.base)))


def with_private_local_factors(adapter: Adapter, run: str, device: Device, *, release: bool) -> Adapter:
    """Return the adapter for a noised measurement: with the B of private rounds only, whose noise was of the same kind.

    Any other B is a function of every picture without a bound, and a change of it would change every gain.

    Args:
        adapter: the received adapter; A is `[rank, in]`, B is `[out, rank]`.
        run: the run's id.
        device: the device that measures.
        release: whether the noise is secure rather than simulated.
    """
    stored = device.store.local_factors(_run(run, device.report.base))
    return _with_stored(adapter, stored if stored and stored.promise == _promise(True, release) else None)


def _with_stored(adapter: Adapter, stored: LocalFactors | None) -> Adapter:
    return replace_b(adapter, stored.after) if stored else adapter


def replace_b(adapter: Adapter, local_b: dict[str, Tensor]) -> Adapter:
    """Replace B by the device's own at every site where the shapes match."""
    return {
        name: factors._replace(b=local_b[name])
        if name in local_b and local_b[name].shape == factors.b.shape
        else factors
        for name, factors in adapter.items()
    }


def _run(run: str, base: str) -> str:
    return hashlib.sha256(repr((run, base)).encode()).hexdigest()


def _promise(private: bool, release: bool) -> str:
    """Name the guarantee that B was trained under.

    Values without noise, or with simulated noise, never enter a round with a guarantee.
    """
    return f"{'private' if private else 'open'}, {'release' if release else 'simulated'}"  # stored; don't change
