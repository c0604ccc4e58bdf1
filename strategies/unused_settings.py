"""Refuse settings that have no effect in a configuration, since a user who sets one expects an effect."""

from __future__ import annotations

from collections.abc import Iterator

from common.errors import AntherError
from conf.schemas.cohort import OortConfig
from conf.schemas.fleet import WorkloadConfig
from conf.schemas.simulation import SimulationConfig


def refuse_unused(config: SimulationConfig) -> None:
    """Raise AntherError with one line for the first unused setting."""
    for key, user in _unused(config):
        raise AntherError(f"{key}: only used by {user}; remove it")


def _unused(config: SimulationConfig) -> Iterator[tuple[str, str]]:
    """Yield each setting that is set but not used, with its value and the component that would use it."""
    for key, value, used, user in _settings(config):
        if value is not None and not used:
            yield f"{key}={value:g}" if isinstance(value, int | float) else key, user


def _settings(config: SimulationConfig) -> Iterator[tuple[str, object, bool, str]]:
    """Yield the key of each setting, its value (None: not set), whether it is used, and the component that uses it."""
    robust, rules, optimizer = config.robust, set(config.robust.rules), config.server_optimizer
    fleet, selection, loop = config.fleet, config.selection, config.round_loop
    by_median, selects = "norm_bound" in rules and robust.norm_bound is None, config.cohort.size is not None
    draws = selection.name in ("deadline", "power_of_choice", "energy_delay")
    oort, overlap = selection.name in ("oort", "eafl"), loop.mode == "async"
    adaptive = optimizer.name in ("fedadam", "fedyogi")
    trims = bool(rules & {"krum", "trimmed_mean"})
    yield "robust.outlier_fraction", robust.outlier_fraction, trims, "krum and trimmed_mean (robust.rules)"
    yield "robust.norm_factor", robust.norm_factor, by_median, "norm_bound (robust.rules) without robust.norm_bound"
    yield "server_optimizer.momentum", optimizer.momentum, optimizer.name != "none", "a server_optimizer.name"
    yield "server_optimizer.beta2", optimizer.beta2, adaptive, "server_optimizer.name=fedadam and fedyogi"
    yield "server_optimizer.tau", optimizer.tau, adaptive, "server_optimizer.name=fedadam and fedyogi"
    yield "round_loop.buffer_size", loop.buffer_size, overlap, "round_loop.mode=async"
    yield "round_loop.concurrency", loop.concurrency, overlap, "round_loop.mode=async"
    yield (
        "selection.candidate_factor",
        selection.candidate_factor,
        draws and selects,
        "selection=deadline, power_of_choice and energy_delay",
    )
    weights = selection.name == "eafl" and selects
    yield "selection.utility_weight", selection.utility_weight, weights, "selection=eafl"
    given = None if selection.oort == OortConfig() else "given"
    yield "selection.oort", given, oort and selects, "selection=oort and eafl"
    given = None if fleet.workload == WorkloadConfig() else "given"
    predicted = fleet.timed or config.planning.name == "device"
    yield "fleet.workload", given, predicted, "a fleet with timed=true, and planning.name=device"
