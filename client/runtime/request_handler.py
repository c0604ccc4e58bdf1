"""Answer a device's requests with a base that stays loaded, in a worker or in a simulated node."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from client.device import Device, from_config, non_negative_int
from client.power.conditions import Conditions
from client.power.meter import Meter
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from client.runtime.throttle import Throttle
from client.runtime.throttled_jobs import Perform, wait, with_meter, with_throttle
from client.store.store import Store
from common.errors import AntherError
from models.base.base import Base, load
from models.files import assets
from models.lora.adapter import adapter_shapes
from privacy.policy import RequestRefusedError
from protocol.messages import Evaluate, Personalize, Query, Reply, Request, payloads
from protocol.tensor_codec import max_payload
from training.capacity import budget, check_free, total_and_free
from training.engine import perform
from training.jobs import Cancelled, Job, Result, never
from training.passes import free_buffers

DEFAULT_BASE = "glyphs"


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """Resources that a worker keeps open for its lifetime."""

    store: Store
    read: Callable[[], Conditions]
    meter: Meter
    throttle: Throttle

    def device(self, stated: Mapping[str, object], base: Base) -> Device:
        """Build the device for one request."""
        device = from_config(
            stated,
            base,
            store=self.store,
            read=self.read,
            measured_cost=lambda: self.meter.last,
            wait=functools.partial(wait, self.throttle),
        )
        self.meter.watts = device.report.watts  # assumed without a meter: from the configuration or the benchmark
        return device

    def wrap(self, perform: Perform) -> Perform:
        """Wrap `perform` with metering and throttling."""
        return with_throttle(with_meter(perform, self.meter), self.throttle)


def answer(
    request: Request, stated: Mapping[str, object], *, resources: WorkerResources | None = None
) -> Reply | Exception:
    """Handle a request; return the reply, or the exception that prevented it.

    Args:
        request: the request.
        stated: the node's configuration (`client.device.from_config`), and `memory-gib` for training.
        resources: the worker's resources; None: the store is opened for this request, and nothing is measured.
    """
    try:
        base = _loaded_base(request, stated, resources)
        if assets.is_hash(str(stated.get("base", ""))) and base.hash != stated["base"]:
            raise AntherError(
                f"{base.folder}: has changed, its hash is now {base.hash[:12]}: remove it from {base.folder.parent}"
            )
        # Only from the device's own configuration: otherwise a server could probe the free memory.
        memory_gib = stated.get("memory-gib")
        memory = budget(None if memory_gib is None else float(str(memory_gib)), base.device)
        _check_free(memory, base)
        device = from_config(stated, base) if resources is None else resources.device(stated, base)
        max_bytes = max_payload(adapter_shapes(device.sites, -1), free=device.policy.max_rank)
        if any(len(data) > max_bytes for data in payloads(request).values()):
            raise RequestRefusedError(
                f"an adapter of more than {max_bytes} bytes: no adapter of this base is that large"
            )
        timesteps = request.timesteps if isinstance(request, Evaluate | Personalize) else 1
        work: Perform = errors_as_results(
            functools.partial(
                perform,
                base,
                memory=memory,
                timesteps=timesteps,
                cancelled=never if resources is None else resources.throttle,
            )
        )
        return run_handlers({"": handle(request, device)}, work if resources is None else resources.wrap(work))[""]
    except Exception as error:  # an error ends only this request
        return error


def _check_free(memory: int, base: Base) -> None:
    """Raise AntherError if this much memory isn't free, after releasing buffers cached by earlier training.

    Their size may depend on the number of pictures, which no error may reveal.
    """
    if memory > total_and_free(base.device)[1]:
        free_buffers(base)
        check_free(memory, base.device, key="worker.memory_gib")


def errors_as_results(perform: Perform) -> Perform:
    """Make an exception of `perform` the result of every job, so that the requester can still reply."""

    def safely(jobs: list[Job]) -> Sequence[Result | Exception]:
        try:
            return perform(jobs)
        except Exception as error:
            return [error] * len(jobs)

    return safely


def _loaded_base(request: Request, stated: Mapping[str, object], resources: WorkerResources | None) -> Base:
    """Return the base, adapted as requested, if the throttle allows it to be loaded and used.

    While the throttle pauses training, a Query is still answered, since it reports the device's current state, unless
    the base would have to be loaded or changed for it.

    Args:
        request: the request.
        stated: the node's configuration.
        resources: the worker's resources, including its throttle; None: no throttle.
    """
    settings = (
        str(stated.get("base", DEFAULT_BASE)),
        str(stated.get("weights", "fp32")),
        str(stated.get("device", "auto")),
        str(stated.get("checkpointing", "none")),
        non_negative_int(stated, "resolution") or None,
    )
    if resources is not None:
        throttle, is_query = resources.throttle, isinstance(request, Query)
        is_loaded = is_query and _loaded.is_loaded(settings, request.adapted)
        reason = throttle.must_wait() if is_query and not is_loaded else None
        if reason or (not is_query and throttle()):
            raise Cancelled(f"stopped before it started: {reason or throttle.last_reason}")
    return _loaded(settings, request.adapted)


Settings = tuple[str, str, str, str, int | None]


class _Loaded:
    """Cache of this process's base, which stays loaded between requests even if they adapt different layers."""

    def __init__(self) -> None:
        self._settings: Settings | None = None
        self._base: Base | None = None
        self._default: tuple[str, ...] = ()

    def __call__(self, settings: Settings, adapted: tuple[str, ...] | None) -> Base:
        """Return the base with these settings and adapted layers; RequestRefusedError if they can't be adapted."""
        if self._base is None or self._settings != settings:
            self.unload()  # before another is loaded
            folder, weights, device, checkpointing, resolution = settings
            self._base = load(
                folder, weights=weights, device=device, checkpointing=checkpointing, resolution=resolution
            )
            self._settings, self._default = settings, tuple(self._base.sites)
        try:
            self._base.set_sites(adapted or self._default)
        except AntherError as error:
            raise RequestRefusedError(str(error)) from None
        return self._base

    def is_loaded(self, settings: Settings, adapted: tuple[str, ...] | None) -> bool:
        """Return whether neither loading nor a change of layers is needed."""
        if self._base is None or settings != self._settings:
            return False
        return set(self._base.sites) == set(adapted or self._default)

    def unload(self) -> None:
        """Release the base."""
        self._base, self._settings = None, None


_loaded = _Loaded()
