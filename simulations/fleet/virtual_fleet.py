"""State of a simulated fleet: initialized from the seed, saved after each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import atomic_files, strict_json
from common.errors import AntherError
from common.seeding import derive_seed
from common.units import HOUR
from conf.schemas.fleet import FleetConfig
from simulations.fleet.availability import Availability, DailySchedule, RecordedSchedule, load_traces, uniform
from simulations.fleet.device_model import DeviceState, PowerModel
from simulations.fleet.heat import Heat
from simulations.fleet.outcomes import FleetLog, FleetRound
from simulations.fleet.participants import Participant
from simulations.fleet.virtual_clock import VirtualClock
from simulations.fleet.virtual_device import VirtualDevice

_MIN_INITIAL_CHARGE = 0.3
"""Initial charge is uniform between this fraction of a full battery and a full one."""
_SAVED_ROUNDS = 2  # newest files that are kept


@dataclass(frozen=True, kw_only=True)
class _SavedDevice:  # stored: the field names are the format
    charge: float
    heat: float
    hot: bool
    off: bool


@dataclass(frozen=True, kw_only=True)
class _SavedFleet:  # stored: the field names are the format
    time: float
    devices: dict[str, _SavedDevice]
    rounds: tuple[FleetRound, ...]


class VirtualFleet:
    """Fleet with its clock and log, saved to one file per round in a folder.

    Tasks that were running when the process was killed are lost; the battery charge that they used is not restored.
    """

    def __init__(self, folder: Path, devices: Mapping[str, VirtualDevice]) -> None:
        self.devices, self.clock, self.log = devices, VirtualClock(), FleetLog()
        self._folder = folder

    def save(self, number: int) -> None:
        """Complete a round and save the state from which a killed run resumes."""
        now = self.clock.now()
        self.log.close(number, now)
        states = {name: device.state_at(now) for name, device in self.devices.items()}
        saved = _SavedFleet(
            time=now,
            devices={
                name: _SavedDevice(charge=state.charge, heat=state.heat.level, hot=state.heat.hot, off=state.off)
                for name, state in states.items()
            },
            rounds=self.log.rounds,
        )
        atomic_files.write(self._file(number), strict_json.dumps(saved).encode())
        self._file(number - _SAVED_ROUNDS).unlink(missing_ok=True)

    def resume(self, number: int) -> None:
        """Restore the state after a round.

        Raises:
            AntherError: its file is missing, damaged, or of another fleet.
        """
        file = self._file(number)
        try:
            saved = strict_json.from_plain(_SavedFleet, strict_json.loads(file.read_bytes()))
            if saved.devices.keys() != self.devices.keys():
                raise ValueError("it has other devices")
        except (OSError, ValueError) as error:
            raise AntherError(f"{file}: can't be resumed from ({error}): restore it, or start a new run") from error
        self.clock.resume(saved.time)
        self.log = FleetLog(saved.rounds)
        for name, saved_device in saved.devices.items():
            heat = Heat(saved_device.heat, saved_device.hot)
            self.devices[name].state = DeviceState(saved.time, saved_device.charge, heat, saved_device.off)

    def _file(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}.json"


def build_virtual_fleet(
    settings: FleetConfig, people: Sequence[Participant], folder: Path, *, seed: int
) -> VirtualFleet:
    """Build the fleet in its initial state.

    Args:
        settings: schedules of the fleet.
        people: the participants.
        folder: folder of the saved states.
        seed: determines schedules and initial charge.

    Raises:
        AntherError: `fleet.trace` can't be read.
    """
    trace = settings.trace
    recorded = list(load_traces(Path(trace)).values()) if trace else []
    return VirtualFleet(
        folder,
        {
            person.name: _build_device(settings, person, recorded[index % len(recorded)] if recorded else None, seed)
            for index, person in enumerate(people)
        },
    )


def _build_device(
    settings: FleetConfig, person: Participant, recorded: RecordedSchedule | None, seed: int
) -> VirtualDevice:
    profile, name = person.hardware.profile, person.name
    power_model = PowerModel.of(profile, person.hardware.known_device)
    availability: Availability = recorded or DailySchedule(
        profile.plugged_hours,
        profile.idle_hours,
        phase=uniform(seed, name, "zone", low=-0.5, high=0.5) * settings.timezone_spread * HOUR,
        jitter=settings.schedule_jitter * HOUR,
        seed=derive_seed(seed, name, "habits"),
    )
    charge = uniform(seed, name, "charge", low=_MIN_INITIAL_CHARGE) * (power_model.capacity or 0.0)
    state = DeviceState(0.0, charge)
    return VirtualDevice(
        name=name, hardware=person.hardware, power_model=power_model, availability=availability, state=state
    )
