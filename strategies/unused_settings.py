"""Settings that nothing of a configuration reads: whoever gives one expects it to do something."""

from __future__ import annotations

from collections.abc import Iterator

from common.errors import AntherError
from conf.schemas.cohort import OortConfig
from conf.schemas.fleet import WorkloadConfig
from conf.schemas.simulation import SimulationConfig


def refuse_ignored(config: SimulationConfig) -> None:
    """AntherError, in one line, for the first of them."""
    for key, reader in _ignored(config):
        raise AntherError(f"{key}: is only for {reader}; leave it out")


def _ignored(config: SimulationConfig) -> Iterator[tuple[str, str]]:
    """Each that is given though nobody reads it, with its value, and who would."""
    for key, value, read, reader in _settings(config):
        if value is not None and not read:
            yield f"{key}={value:g}" if isinstance(value, int | float) else key, reader


def _settings(config: SimulationConfig) -> Iterator[tuple[str, object, bool, str]]:
    """Key, value (None: not given), whether it is read, and by whom it would be."""
    robust, rules, optimizer = config.robust, set(config.robust.rules), config.server_optimizer
    fleet, selection, loop = config.fleet, config.selection, config.round_loop
    by_median, chooses = "norm_bound" in rules and robust.norm_bound is None, config.cohort.size is not None
    draws = selection.name in ("deadline", "power_of_choice", "energy_delay")
    oort, overlap = selection.name in ("oort", "eafl"), loop.mode == "async"
    adaptive = optimizer.name in ("fedadam", "fedyogi")
    cuts = bool(rules & {"krum", "trimmed_mean"})
    yield "robust.outlier_fraction", robust.outlier_fraction, cuts, "krum and trimmed_mean (robust.rules)"
    yield "robust.norm_factor", robust.norm_factor, by_median, "norm_bound (robust.rules) without robust.norm_bound"
    yield "server_optimizer.momentum", optimizer.momentum, optimizer.name != "none", "a server_optimizer.name"
    yield "server_optimizer.beta2", optimizer.beta2, adaptive, "server_optimizer.name=fedadam and fedyogi"
    yield "server_optimizer.tau", optimizer.tau, adaptive, "server_optimizer.name=fedadam and fedyogi"
    yield "round_loop.buffer_size", loop.buffer_size, overlap, "round_loop.mode=async"
    yield "round_loop.concurrency", loop.concurrency, overlap, "round_loop.mode=async"
    yield (
        "selection.candidate_factor",
        selection.candidate_factor,
        draws and chooses,
        "selection=deadline, power_of_choice and energy_delay",
    )
    weighs = selection.name == "eafl" and chooses
    yield "selection.utility_weight", selection.utility_weight, weighs, "selection=eafl"
    given = None if selection.oort == OortConfig() else "given"
    yield "selection.oort", given, oort and chooses, "selection=oort and eafl"
    given = None if fleet.workload == WorkloadConfig() else "given"
    felt = fleet.timed or config.planning.name == "device"
    yield "fleet.workload", given, felt, "a fleet with timed=true, and planning.name=device"
