"""The lives of a simulated fleet: how they begin, by a seed, and how they are kept from round to round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import atomic_files, strict_json
from common.errors import AntherError
from common.seeding import derive_seed
from common.units import HOUR
from conf.schemas.simulation import SimulationConfig
from simulations.fleet.availability import Availability, DailySchedule, RecordedSchedule, load_traces, uniform
from simulations.fleet.device_model import DeviceState, PowerModel
from simulations.fleet.heat import Heat
from simulations.fleet.outcomes import FleetLog, FleetRound
from simulations.fleet.participants import Participant
from simulations.fleet.virtual_clock import VirtualClock
from simulations.fleet.virtual_device import VirtualDevice

_LEAST_CHARGED = 0.3
"""Share of a full battery that a life begins with at least, drawn up to a full one."""
_KEPT = 2  # newest files


@dataclass(frozen=True, kw_only=True)
class _At:
    charge: float
    heat: float
    hot: bool
    off: bool


@dataclass(frozen=True, kw_only=True)
class _Saved:
    time: float
    devices: dict[str, _At]
    rounds: tuple[FleetRound, ...]


class VirtualFleet:
    """A fleet with its clock and its log, in a folder: a file for each round.

    What devices were at when a run was killed is lost, as their batteries' charge is not.
    """

    def __init__(self, folder: Path, fleet: Mapping[str, VirtualDevice]) -> None:
        self.fleet, self.clock, self.log = fleet, VirtualClock(), FleetLog()
        self._folder = folder

    def keep(self, number: int) -> None:
        """A round is over, and is going to be what a run that was killed goes on from."""
        now = self.clock.now()
        self.log.close(number, now)
        moments = {name: owned.at(now) for name, owned in self.fleet.items()}
        saved = _Saved(
            time=now,
            devices={
                name: _At(charge=state.charge, heat=state.heat.level, hot=state.heat.hot, off=state.off)
                for name, state in moments.items()
            },
            rounds=self.log.rounds,
        )
        atomic_files.write(self._file(number), strict_json.dumps(saved).encode())
        self._file(number - _KEPT).unlink(missing_ok=True)

    def resume(self, number: int) -> None:
        """Go on after this round.

        Raises AntherError if its file is missing, damaged, or another fleet's.
        """
        file = self._file(number)
        try:
            saved = strict_json.from_plain(_Saved, strict_json.loads(file.read_bytes()))
            if saved.devices.keys() != self.fleet.keys():
                raise ValueError("it is of other devices")
        except (OSError, ValueError) as error:
            raise AntherError(f"{file}: can't be resumed from ({error}): restore it, or start anew") from error
        self.clock.resume(saved.time)
        self.log = FleetLog(saved.rounds)
        for name, at in saved.devices.items():
            self.fleet[name].state = DeviceState(saved.time, at.charge, Heat(at.heat, at.hot), at.off)

    def _file(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}.json"


def lives(config: SimulationConfig, people: Sequence[Participant], folder: Path) -> VirtualFleet:
    """The beginning of everybody's life.

    Raises AntherError if `fleet.trace` can't be read.
    """
    trace = config.fleet.trace
    recorded = list(load_traces(Path(trace)).values()) if trace else []
    return VirtualFleet(
        folder,
        {
            person.name: _born(config, person, recorded[place % len(recorded)] if recorded else None)
            for place, person in enumerate(people)
        },
    )


def _born(config: SimulationConfig, person: Participant, recorded: RecordedSchedule | None) -> VirtualDevice:
    fleet, profile, name = config.fleet, person.hardware.profile, person.name
    body = PowerModel.of(profile, person.hardware.known)
    hours: Availability = recorded or DailySchedule(
        profile.plugged,
        profile.idle,
        phase=uniform(config.seed, name, "zone", low=-0.5, high=0.5) * fleet.zones * HOUR,
        jitter=fleet.jitter * HOUR,
        seed=derive_seed(config.seed, name, "habits"),
    )
    charged = uniform(config.seed, name, "charge", low=_LEAST_CHARGED) * (body.capacity or 0.0)
    state = DeviceState(0.0, charged)
    return VirtualDevice(name=name, hardware=person.hardware, body=body, hours=hours, state=state)
