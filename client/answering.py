"""Answers a device's requests with a base that stays loaded: the same in a worker and in a simulated node."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from client.device import Device, from_config, whole
from client.drive import drive
from client.guard import Guard
from client.guarded import Perform, measured, with_guard
from client.logic import handle
from client.power.conditions import Conditions
from client.power.meter import Meter
from client.store import Store
from conf.compose import compose
from conf.errors import AntherError
from conf.schemas import Simulation
from models import assets
from models.adapter import shapes
from models.base import Base, load
from privacy.policy import Refusal
from protocol.codec import largest
from protocol.messages import Reply, Request, payloads
from training.engine import perform
from training.memory import budget, check_free

DEFAULT_BASE = "glyphs"


@dataclass(frozen=True, kw_only=True)
class Owned:
    """What a worker holds of its device for as long as it lives."""

    store: Store
    read: Callable[[], Conditions]
    meter: Meter
    guard: Guard

    def device(self, stated: Mapping[str, object], base: Base) -> Device:
        found = from_config(stated, base, store=self.store, read=self.read, spent=lambda: self.meter.last)
        self.meter.watts = found.report.watts  # where nothing measures: stated, or of its benchmark
        return found

    def around(self, perform: Perform) -> Perform:
        return with_guard(measured(perform, self.meter), self.guard)


def answer(
    request: Request,
    overrides: str,
    stated: Mapping[str, object],
    *,
    owned: Owned | None = None,
) -> Reply | Exception:
    """The reply to a request, or what kept it from being given.

    Args:
        overrides: of the run's configuration, which the server composed: it says where the base is adapted and how
            losses are measured, and nothing of what a device may take.
        stated: the node's own configuration (`client.device.from_config`); `memory-gib` for training.
        owned: what a worker holds of its device; None: it is opened for this request, and nothing is measured.
    """
    try:
        config = _composed(overrides)
        weights, device = str(stated.get("weights", "fp32")), str(stated.get("device", "auto"))
        base = _base(
            str(stated.get("base", DEFAULT_BASE)), config.adapter.sites, weights, device,
            str(stated.get("checkpointing", "none")), whole(stated, "resolution") or None,
        )  # fmt: skip
        if assets.is_hash(str(stated.get("base", ""))) and base.hash != stated["base"]:
            raise AntherError(
                f"{base.folder}: not what it was, its hash is {base.hash[:12]} now: remove it from {base.folder.parent}"
            )
        own = stated.get("memory-gib")
        memory = budget(config.cohort.memory_gib if own is None else float(str(own)), base.device)
        check_free(memory, base.device)
        owner = from_config(stated, base) if owned is None else owned.device(stated, base)
        most = largest(shapes(owner.sites, -1), free=owner.policy.max_rank)
        if any(len(data) > most for data in payloads(request).values()):
            raise Refusal(f"an adapter of more than {most} bytes, which no adapter of this base takes")
        work: Perform = functools.partial(perform, base, memory=memory, timesteps=config.evaluation.timesteps)
        return drive({"": handle(request, owner)}, work if owned is None else owned.around(work))[""]
    except Exception as error:  # whatever it is, it is this request's alone
        return error


@functools.lru_cache(maxsize=4)
def _composed(overrides: str) -> Simulation:
    return compose(overrides)


@functools.lru_cache(maxsize=1)
def _base(path: str, sites: str | None, weights: str, device: str, checkpointing: str, resolution: int | None) -> Base:
    """Kept between the requests that one process answers."""
    return load(path, sites=sites, weights=weights, device=device, checkpointing=checkpointing, resolution=resolution)
