"""Settings of a simulation that depend on its data or on each other, checked before a base is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from common.errors import AntherError
from conf.schemas.fleet import WorkloadConfig
from conf.schemas.simulation import SimulationConfig


def with_people_counted(config: SimulationConfig) -> SimulationConfig:
    """Return the configuration with `data.people`, counted in the data set if it is null; the schema checks it again.

    Raises:
        AntherError: the data set can't be read, or has too few people for another setting.
    """
    if config.data.known_count() is not None:
        return config
    from simulations.fleet.people import count_people  # reads Parquet, rarely needed

    try:
        return replace(config, data=replace(config.data, people=count_people(config.data)))
    except ValueError as error:  # raised by a schema's __post_init__
        raise AntherError(str(error)) from error


def check_time(config: SimulationConfig) -> None:
    """Refuse settings that need a timed fleet, or predicted costs, if there is none, and a quorum above all devices."""
    fleet, over, loop = config.fleet, config.cohort.overselection, config.round_loop
    hint = "requires a fleet with timed=true, such as fleet=week"
    if over > 1 and not fleet.timed:
        raise AntherError(f"cohort.overselection={over:g} {hint}: all replies of this fleet arrive at once")
    if loop.name == "async" and not fleet.timed:
        raise AntherError(f"round_loop=async {hint}: training takes no time in this fleet")
    for key in () if fleet.timed else _timed_settings(config):
        raise AntherError(f"{key} {hint}: devices of this fleet have no battery, owner, heat or schedule")
    if fleet.workload != WorkloadConfig() and not fleet.timed:
        from strategies.planning import PLANNINGS  # rarely needed

        if PLANNINGS.lookup(config.planning.name).every_site:
            names = [name for name, method in PLANNINGS.items() if not method.every_site]
            raise AntherError(
                "fleet.workload: only used by a fleet with timed=true, and by "
                f"{' and '.join(f'planning={name}' for name in names)}; remove it"
            )
    if loop.name == "sync" and loop.quorum > (devices := config.data.count()):
        raise AntherError(f"round_loop.quorum={loop.quorum}: there are {devices} devices; lower it, or add devices")


def _timed_settings(config: SimulationConfig) -> Iterator[str]:
    """Yield the configured settings that only a timed fleet uses."""
    eligible, fleet = config.cohort.eligibility, config.fleet
    if eligible.min_battery is not None:
        yield f"cohort.eligibility.min_battery={eligible.min_battery:g}"
    if eligible.idle:
        yield "cohort.eligibility.idle=true"
    if eligible.cool:
        yield "cohort.eligibility.cool=true"
    if config.planning.max_battery_fraction is not None:
        yield f"planning.max_battery_fraction={config.planning.max_battery_fraction:g}"
    if fleet.timezone_spread:
        yield f"fleet.timezone_spread={fleet.timezone_spread:g}"
    if fleet.schedule_jitter != type(fleet).schedule_jitter:
        yield f"fleet.schedule_jitter={fleet.schedule_jitter:g}"
