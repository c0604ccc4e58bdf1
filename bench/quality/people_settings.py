"""Settings of `anther bench people`: the tuned federation, its private forms, and the tuned training without others."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, cast

from common import strict_json
from common.errors import AntherError, os_error
from conf.schemas.simulation import SimulationConfig
from strategies.declarations import create
from training.personalization import PERSONALIZATIONS, Personalization, steps_by_round

_CORES = ("aggregation=fedsb", "adapter.shared.lr_schedule=cosine", "rounds=25", "adapter.shared.steps=1")
"""A round of one step takes the mean after every noised step, so the noise causes no drift within a round."""
_FEDERATION = ("preset=people", "cohort.size=48")
"""A round has four letters of each of 48 people. Of 240 people, each takes part in every fifth round on average."""
_NOISED = ("privacy=example", "privacy.noise_multiplicity=4", "adapter.shared.batch_size=${data.train}")

FILE = Path(__file__).parents[1] / "results" / "people-settings.json"


@dataclass(frozen=True)
class LocalSettings:
    """Training of one adapter from a person's own letters only."""

    sites: str = "attention"
    rank: int = 16
    lr: float = 2e-3
    batch_size: int = 4
    proximal: float = 0.0
    """μ of a penalty on the distance to the start."""
    prior: float = 0.0
    """Weight of prior preservation (Ruiz et al., 2023), with letters drawn by the base; 0: without."""
    steps: int = 150
    """Steps after which training stops, if that is not decided by validation letters."""
    validated: bool = False
    """Whether each person keeps the adapter with the lowest loss on the own validation letters."""


@dataclass(frozen=True)
class PeopleSettings:
    """All settings, which are chosen on development people."""

    federation: tuple[str, ...]
    """Overrides of `anther simulate` for every open federation with personal adapters."""
    by_letters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Further overrides for a number of training letters."""
    reference: tuple[str, ...] = ()
    """Overrides of the open federation whose shared gain the private runs are compared with."""
    private: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Overrides of each private run."""
    local: dict[str, LocalSettings] = field(default_factory=dict)
    """Training without others, by number of training letters."""
    every: int = 5
    """Steps between two points of a curve over steps."""

    def overrides(self, letters: int) -> list[str]:
        """Return the overrides of a federation of people with this number of training letters."""
        nearest = _nearest(self.by_letters, letters)
        return [*self.federation, *(self.by_letters[nearest] if nearest else ()), f"data.train={letters}"]

    def local_for(self, letters: int) -> LocalSettings:
        """Return the settings without others for this number of letters, or for the nearest number that was tuned."""
        nearest = _nearest(self.local, letters)
        return self.local[nearest] if nearest else LocalSettings()


class DeviceSteps(NamedTuple):
    """Steps of one person's device: forward and backward passes of a batch."""

    rounds: float
    """In all rounds; a mean over people if a round has only some of them."""
    personal: int
    """After the rounds, at most."""

    @property
    def total(self) -> float:
        """All steps of a member; training without others gets as many."""
        return self.rounds + self.personal


def device_steps(config: SimulationConfig, members: int) -> DeviceSteps:
    """Count the steps of one member's device, with those of its personalization method.

    Args:
        config: configuration of the federation.
        members: number of people in its rounds.
    """
    method = _method(config)
    rounds = _steps_in_rounds(config, method, members, config.rounds)
    return DeviceSteps(rounds, method.all_steps_after(config.adapter.personal.steps))


def with_steps(config: SimulationConfig, members: int, total: int) -> list[str]:
    """Return the overrides that scale a federation to a total number of steps per device.

    Rounds, steps of the personalization method and personal steps keep their proportions as far as whole rounds allow;
    each is at least one.

    Args:
        config: configuration of the federation.
        members: number of people in its rounds.
        total: steps of one device, in the rounds and after them.
    """
    scale, method = total / device_steps(config, members).total, _method(config)
    scaled = {}
    if method.last_round_steps is not None:
        scaled["round_steps"] = max(1, round(method.last_round_steps * scale))
    if warmup := getattr(method, "warmup", 0):
        scaled["warmup"] = round(warmup * scale)
    method = _method(config, scaled)
    rounds = max(1, round(config.rounds * scale))
    while rounds > 1 and total - _steps_in_rounds(config, method, members, rounds) < 1:
        rounds -= 1
    remaining = math.floor(total - _steps_in_rounds(config, method, members, rounds))
    if fitted := method.steps_after:
        fitted = scaled["steps"] = max(1, min(round(fitted * scale), remaining - 1))
    personal = (remaining - fitted) // method.passes_per_step
    words = [f"personalization.{key}={value}" for key, value in scaled.items()]
    return [f"rounds={rounds}", *words, f"adapter.personal.steps={max(1, personal)}"]


def _method(config: SimulationConfig, changes: Mapping[str, int] = MappingProxyType({})) -> Personalization:
    """Return a configuration's method of personalization, with some options changed."""
    chosen = config.personalization
    options = {**chosen.options, **changes}
    return cast(Personalization, create(PERSONALIZATIONS, chosen.name, options, key="personalization"))


def _steps_in_rounds(config: SimulationConfig, method: Personalization, members: int, rounds: int) -> float:
    """Return a member's expected steps in all rounds; a round with some of the members has each equally often."""
    fraction = (config.cohort.size or members) / members
    return fraction * sum(steps_by_round(method, rounds=rounds, shared=config.adapter.shared.steps))


DEFAULT = PeopleSettings(
    federation=_FEDERATION,
    reference=_FEDERATION,
    private={
        "open": (*_CORES, "adapter.shared.lr=0.08"),
        "example-8": (*_CORES, *_NOISED, "privacy.epsilon=8", "adapter.shared.lr=0.3"),
        "example-2": (*_CORES, *_NOISED, "privacy.epsilon=2", "adapter.shared.lr=0.3"),
        "device-8": (
            "aggregation=fedsb",
            "rounds=10",
            "adapter.shared.steps=5",
            "privacy=device",
            "privacy.epsilon=8",
            "adapter.shared.lr=0.02",
        ),
    },
)


def load_settings(file: Path | None = None) -> PeopleSettings:
    """Read a settings file; without one, the tuned settings, or the defaults if nothing was tuned yet.

    Raises:
        AntherError: the file can't be read, or has other fields.
    """
    if file is None and not FILE.exists():
        return DEFAULT
    file = file or FILE
    try:
        return strict_json.from_plain(PeopleSettings, strict_json.loads(file.read_text(encoding="utf-8"))["settings"])
    except OSError as error:
        raise os_error(error, file) from error
    except (ValueError, KeyError, TypeError) as error:
        raise AntherError(
            f"{file}: holds no settings of people ({error}); make them by anther bench people tune"
        ) from error


def save_settings(file: Path, settings: PeopleSettings, record: Mapping[str, object]) -> None:
    """Write settings, with a record of the command that chose them.

    Args:
        file: path of the JSON file.
        settings: the settings.
        record: further keys, such as the command and all scores.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": dataclasses.asdict(settings), **record}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _nearest(by_letters: Mapping[str, object], letters: int) -> str | None:
    """Return the key nearest to a number of letters, as a ratio; None without keys."""
    return min(by_letters, key=lambda key: (abs(math.log(int(key) / letters)), int(key)), default=None)
