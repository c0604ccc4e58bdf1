"""Settings that nothing of a configuration reads: whoever gives one expects it to do something."""

from __future__ import annotations

from collections.abc import Iterator

from common.errors import AntherError
from conf.schemas.simulation import OortConfig, SimulationConfig, WorkloadConfig


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
    chosen, fleet, selection = config.strategy, config.fleet, config.selection
    robust, adaptive = set(chosen.robust), chosen.optimiser in ("fedadam", "fedyogi")
    by_median, chooses = "norm" in robust and chosen.norm_bound is None, fleet.sample is not None
    draws, oort = selection.name in ("deadline", "loss_fair", "thrifty"), selection.name in ("oort", "energy")
    overlap = chosen.timing == "async"
    yield "strategy.outliers", chosen.outliers, bool(robust & {"krum", "trimmed"}), "krum and trimmed (strategy.robust)"
    yield "strategy.norm_factor", chosen.norm_factor, by_median, "norm (strategy.robust) without strategy.norm_bound"
    yield "strategy.momentum", chosen.momentum, chosen.optimiser != "none", "a strategy.optimiser"
    yield "strategy.second_moment", chosen.second_moment, adaptive, "strategy.optimiser=fedadam and fedyogi"
    yield "strategy.tau", chosen.tau, adaptive, "strategy.optimiser=fedadam and fedyogi"
    yield "strategy.buffer", chosen.buffer, overlap, "strategy.timing=async"
    yield "fleet.concurrency", fleet.concurrency, overlap, "strategy.timing=async"
    yield "selection.more", selection.more, draws and chooses, "selection=deadline, loss_fair and thrifty"
    yield "selection.weight", selection.weight, selection.name == "energy" and chooses, "selection=energy"
    given = None if selection.oort == OortConfig() else "given"
    yield "selection.oort", given, oort and chooses, "selection=oort and energy"
    given = None if fleet.workload == WorkloadConfig() else "given"
    felt = fleet.timed or chosen.planning == "device"
    yield "fleet.workload", given, felt, "a fleet with timed=true, and strategy.planning=device"
