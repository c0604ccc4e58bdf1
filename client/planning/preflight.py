"""Does a plan fit this device? Predicted before anything is computed or charged, and refused with the reason."""

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
from training import cohort
from training.memory import total_and_free


def check_memory(base: Base, store: Store, rank: int, sites: Collection[str]) -> None:
    """Raises Refusal if a pass of one picture, with an adapter of this rank at these sites, may take more than is free.

    On a GPU whatever asks for too much is told so, and nothing else suffers: there nothing is predicted.
    """
    if base.device.type != "cpu":
        return
    chosen = {name: site for name, site in base.sites.items() if name in sites}
    key = _key(base, rank, chosen)
    needed = store.number("pass-bytes", key)
    if needed is None:
        needed = _pass_bytes(base, rank, chosen)
        store.save_number("pass-bytes", key, needed)
    if MARGIN * needed > _free(base):
        cohort.free_buffers(base)
    if MARGIN * needed > _free(base):  # how much there is, is nobody's business
        wanted = f"{MARGIN * needed / MIB:,.0f} MiB to train rank {rank} at {base.resolution}²"
        raise RequestRefusedError(
            f"memory: this base takes about {wanted}, more than is free: ask for a lower rank or fewer sites"
        )


def _free(base: Base) -> int:
    return total_and_free(base.device)[1]


def _key(base: Base, rank: int, sites: Sites) -> str:
    """Of all that a prediction depends on."""
    held = (
        base.hash,
        resident_bytes(base),
        base.dtype,
        base.resolution,
        base.checkpointing,
        len(base.sites),
        sorted(sites.items()),
    )
    return hashlib.sha256(repr((held, rank, torch.__version__)).encode()).hexdigest()


def _pass_bytes(base: Base, rank: int, sites: Sites) -> int:
    """What a pass takes beside the base, which is there already."""
    alone = copy_for_dry_run(base)
    alone.sites = sites
    found = footprint(alone, *example_shapes(find_base(str(base.folder)), base.resolution), rank=rank)
    return found.peak_bytes - found.base_bytes
