"""Does a plan fit this device? Predicted before anything is computed or charged, and refused with the reason."""

from __future__ import annotations

import torch

from client.ladder import MARGIN, MIB
from client.store import Store
from models.base import Base
from models.families.known import find
from models.footprint import example, footprint, stand_in
from privacy.policy import Refusal
from training.memory import total_and_free


def check_memory(base: Base, store: Store, rank: int) -> None:
    """Raises Refusal if a pass of one picture, with an adapter of this rank, may take more than is free now.

    On a GPU whatever asks for too much is told so, and nothing else suffers: there nothing is predicted.
    """
    if base.device.type != "cpu":
        return
    key = f"{base.hash}:{base.resolution}:{base.checkpointing}:{rank}:{torch.__version__}"
    needed = store.number("pass-bytes", key)
    if needed is None:
        needed = _pass_bytes(base, rank)
        store.save_number("pass-bytes", key, needed)
    free = total_and_free(base.device)[1]
    if MARGIN * needed > free:
        wanted = (
            f"{MARGIN * needed / MIB:,.0f} MiB to train rank {rank} at {base.resolution}², of {free / MIB:,.0f} free"
        )
        raise Refusal(f"memory: this base takes about {wanted}: ask for a lower rank, or for fewer sites")


def _pass_bytes(base: Base, rank: int) -> int:
    """What a pass takes beside the base, which is there already."""
    found = footprint(stand_in(base), *example(find(str(base.folder)), base.resolution), rank=rank)
    return found.peak_bytes - found.base_bytes
