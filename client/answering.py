"""Answers a device's requests with a base that stays loaded: the same in a worker and in a simulated node."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from client.device import from_config, whole
from client.drive import drive
from client.logic import handle
from conf.compose import compose
from conf.schemas import Simulation
from models.adapter import shapes
from models.base import Base, load
from privacy.policy import Refusal
from protocol.codec import largest
from protocol.messages import Reply, Request, payloads
from training.engine import perform
from training.jobs import Job, Result
from training.memory import budget, check_free

DEFAULT_BASE = "glyphs"

Perform = Callable[[list[Job]], Sequence[Result | Exception]]


def answer(
    request: Request,
    overrides: str,
    stated: Mapping[str, object],
    *,
    around: Callable[[Perform], Perform] = lambda perform: perform,
) -> Reply | Exception:
    """The reply to a request, or what kept it from being given.

    Args:
        overrides: of the run's configuration, which the server composed: it says where the base is adapted and how
            losses are measured, and nothing of what a device may take.
        stated: the node's own configuration (`client.device.from_config`); `memory-gib` for training.
        around: what its owner puts around the work: a guard, a meter.
    """
    try:
        config = _composed(overrides)
        weights, device = str(stated.get("weights", "fp32")), str(stated.get("device", "auto"))
        base = _base(
            str(stated.get("base", DEFAULT_BASE)), config.adapter.sites, weights, device,
            str(stated.get("checkpointing", "none")), whole(stated, "resolution") or None,
        )  # fmt: skip
        own = stated.get("memory-gib")
        memory = budget(config.cohort.memory_gib if own is None else float(str(own)), base.device)
        check_free(memory, base.device)
        owner = from_config(stated, base)
        most = largest(shapes(owner.sites, -1), free=owner.policy.max_rank)
        if any(len(data) > most for data in payloads(request).values()):
            raise Refusal(f"an adapter of more than {most} bytes, which no adapter of this base takes")
        work = functools.partial(perform, base, memory=memory, timesteps=config.evaluation.timesteps)
        return drive({"": handle(request, owner)}, around(work))[""]
    except Exception as error:  # whatever it is, it is this request's alone
        return error


@functools.lru_cache(maxsize=4)
def _composed(overrides: str) -> Simulation:
    return compose(overrides)


@functools.lru_cache(maxsize=1)
def _base(path: str, sites: str | None, weights: str, device: str, checkpointing: str, resolution: int | None) -> Base:
    """Kept between the requests that one process answers."""
    return load(path, sites=sites, weights=weights, device=device, checkpointing=checkpointing, resolution=resolution)
