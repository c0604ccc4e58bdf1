"""Answers a device's requests with a base that stays loaded: the same in a worker and in a simulated node."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from client.device import Device, from_config, whole
from client.power.conditions import Conditions
from client.power.meter import Meter
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from client.runtime.throttle import Guard
from client.runtime.throttled_jobs import Perform, measured, wait, with_throttle
from client.store.store import Store
from common.errors import AntherError
from models.base import assets
from models.base.base import Base, load
from models.lora.adapter import adapter_shapes
from privacy.policy import RequestRefusedError
from protocol.messages import Evaluate, Personalize, Query, Reply, Request, payloads
from protocol.tensor_codec import max_payload
from training.cohort import free_buffers
from training.engine import perform
from training.jobs import Cancelled, Job, Result, never
from training.memory import budget, check_free, total_and_free

DEFAULT_BASE = "glyphs"


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """What a worker holds of its device for as long as it lives."""

    store: Store
    read: Callable[[], Conditions]
    meter: Meter
    guard: Guard

    def device(self, stated: Mapping[str, object], base: Base) -> Device:
        found = from_config(
            stated,
            base,
            store=self.store,
            read=self.read,
            spent=lambda: self.meter.last,
            wait=functools.partial(wait, self.guard),
        )
        self.meter.watts = found.report.watts  # where nothing measures: stated, or of its benchmark
        return found

    def around(self, perform: Perform) -> Perform:
        return with_throttle(measured(perform, self.meter), self.guard)


def answer(
    request: Request, stated: Mapping[str, object], *, resources: WorkerResources | None = None
) -> Reply | Exception:
    """The reply to a request, or what kept it from being given.

    Args:
        stated: the node's own configuration (`client.device.from_config`); `memory-gib` for training.
        owned: what a worker holds of its device; None: it is opened for this request, and nothing is measured.
    """
    try:
        base = _held(request, stated, resources)
        if assets.is_hash(str(stated.get("base", ""))) and base.hash != stated["base"]:
            raise AntherError(
                f"{base.folder}: not what it was, its hash is {base.hash[:12]} now: remove it from {base.folder.parent}"
            )
        own = stated.get("memory-gib")  # of a server's run nothing is asked here: it could read off what is free
        memory = budget(None if own is None else float(str(own)), base.device)
        _check_free(memory, base)
        owner = from_config(stated, base) if resources is None else resources.device(stated, base)
        most = max_payload(adapter_shapes(owner.sites, -1), free=owner.policy.max_rank)
        if any(len(data) > most for data in payloads(request).values()):
            raise RequestRefusedError(f"an adapter of more than {most} bytes, which no adapter of this base takes")
        timesteps = request.timesteps if isinstance(request, Evaluate | Personalize) else 1
        work: Perform = contained(
            functools.partial(
                perform,
                base,
                memory=memory,
                timesteps=timesteps,
                cancelled=never if resources is None else resources.guard,
            )
        )
        return run_handlers({"": handle(request, owner)}, work if resources is None else resources.around(work))[""]
    except Exception as error:  # whatever it is, it is this request's alone
        return error


def _check_free(memory: int, base: Base) -> None:
    """Raises AntherError if so much isn't free, also without what training has left for the next time.

    How much that is may follow from the number of pictures, which no error may tell.
    """
    if memory > total_and_free(base.device)[1]:
        free_buffers(base)
        check_free(memory, base.device, key="worker.memory_gib")


def contained(perform: Perform) -> Perform:
    """The same; what it raises is the result of every job, so that whoever asked for one can say what comes of it."""

    def safely(jobs: list[Job]) -> Sequence[Result | Exception]:
        try:
            return perform(jobs)
        except Exception as error:
            return [error] * len(jobs)

    return safely


def _held(request: Request, stated: Mapping[str, object], resources: WorkerResources | None) -> Base:
    """The base, adapted where the request says. A guard that says no keeps it from being loaded and from all work.

    A Query is answered whatever the guard says, since it is there to tell of the device's moment; but not if that took
    more than a look.
    """
    settings = (
        str(stated.get("base", DEFAULT_BASE)),
        str(stated.get("weights", "fp32")),
        str(stated.get("device", "auto")),
        str(stated.get("checkpointing", "none")),
        whole(stated, "resolution") or None,
    )
    if resources is not None:
        guard, is_query = resources.guard, isinstance(request, Query)
        ready = is_query and _loaded.ready(settings, request.adapted)
        why = guard.must_wait() if is_query and not ready else None
        if why or (not is_query and guard()):
            raise Cancelled(f"stopped before it began: {why or guard.last_reason}")
    return _loaded(settings, request.adapted)


Settings = tuple[str, str, str, str, int | None]


class _Loaded:
    """The base that this process answers with, kept between requests, whichever layers they adapt."""

    def __init__(self) -> None:
        self._settings: Settings | None = None
        self._base: Base | None = None
        self._default: tuple[str, ...] = ()

    def __call__(self, settings: Settings, adapted: tuple[str, ...] | None) -> Base:
        """The base, with these settings and adapted there; Refusal if it can't be adapted there."""
        if self._base is None or self._settings != settings:
            self.forget()  # before another is loaded
            path, weights, device, checkpointing, resolution = settings
            self._base = load(path, weights=weights, device=device, checkpointing=checkpointing, resolution=resolution)
            self._settings, self._default = settings, tuple(self._base.sites)
        try:
            self._base.set_sites(adapted or self._default)
        except AntherError as error:
            raise RequestRefusedError(str(error)) from None
        return self._base

    def ready(self, settings: Settings, adapted: tuple[str, ...] | None) -> bool:
        """Whether there is nothing to load, and no layer to change."""
        if self._base is None or settings != self._settings:
            return False
        return set(self._base.sites) == set(adapted or self._default)

    def forget(self) -> None:
        self._base, self._settings = None, None


_loaded = _Loaded()
