"""Check that a plan fits this device's memory, by prediction, before anything is computed or charged."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch

from client.store.store import Store
from common.units import MIB
from models.base.base import Base
from models.families.known import find_base
from models.footprint.footprint import MARGIN, copy_for_dry_run, example_shapes, footprint, resident_bytes
from models.lora.adapter import Sites
from privacy.policy import RequestRefusedError
from training.capacity import total_and_free
from training.passes import free_buffers


def check_memory(base: Base, store: Store, rank: int, sites: Collection[str], held_bytes: int = 0) -> None:
    """Raise RequestRefusedError if a pass of one picture may need more memory than is free.

    Nothing is predicted on a GPU: there an allocation that is too large fails with an error and harms no other process.

    Args:
        base: the loaded base.
        store: caches predictions.
        rank: rank of the adapter.
        sites: names of the trained sites.
        held_bytes: bytes that a method of personalization holds besides.
    """
    if base.device.type != "cpu":
        return
    trained_sites = {name: site for name, site in base.sites.items() if name in sites}
    key = _key(base, rank, trained_sites)
    needed = store.number("pass-bytes", key)
    if needed is None:
        needed = _pass_bytes(base, rank, trained_sites)
        store.save_number("pass-bytes", key, needed)
    needed += held_bytes
    if MARGIN * needed > _free(base):
        free_buffers(base)
    if MARGIN * needed > _free(base):  # the message must not reveal the amount of free memory
        requirement = f"{MARGIN * needed / MIB:,.0f} MiB to train rank {rank} at {base.resolution}²"
        raise RequestRefusedError(
            f"memory: this base needs about {requirement}, more than is free; use a lower rank or fewer sites"
        )


def _free(base: Base) -> int:
    return total_and_free(base.device)[1]


def _key(base: Base, rank: int, sites: Sites) -> str:
    """Hash everything that a prediction depends on."""
    inputs = (
        base.hash,
        resident_bytes(base),
        base.dtype,
        base.resolution,
        base.checkpointing,
        len(base.sites),
        sorted(sites.items()),
    )
    return hashlib.sha256(repr((inputs, rank, torch.__version__)).encode()).hexdigest()


def _pass_bytes(base: Base, rank: int, sites: Sites) -> int:
    """Predict the bytes of a pass, excluding the base, which is loaded already."""
    network = copy_for_dry_run(base)
    network.sites = sites
    predicted = footprint(network, *example_shapes(find_base(str(base.folder)), base.resolution), rank=rank)
    return predicted.peak_bytes - predicted.base_bytes
