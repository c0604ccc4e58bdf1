"""Who was trained on? Attacks on the shared adapter of finished runs, by someone who holds the base too.

Members are the pictures on devices that took part. Others are pictures of the same writers that had no part in the
run: test pictures, and what was left of the pool to train from; not those by which a round was chosen. All were dealt
by the writer's name alone, without a look at the pictures. But letters are not dealt evenly, so members are compared
with others of the same letter (`privacy.audit.membership`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from common.errors import AntherError
from conf.cli import to_object
from conf.schemas.audit import MembershipConfig
from conf.schemas.simulation import DataConfig, SimulationConfig
from models.base import base
from models.lora.batched_lora import stack_adapters, to_device
from privacy.accounting import Guarantee
from privacy.audit.membership import AttackTrial, MembershipResult, judge
from server.rounds import checkpoint
from simulations.fleet.participants import assign_writers, own_pictures, writers
from simulations.run_dir import RUN
from training import membership_scores
from training.engine import encode
from training.jobs import EncodeJob, Picture
from training.membership_scores import MembershipScores
from training.memory import budget, inference_share

CONTROL = "loss, base alone"  # knows nothing of the run: what it seems to know is how the pictures were chosen
ATTACKS = {"loss": "loss", "pia": "PIA", "sima": "SimA"}
AGAINST = "{} against the base"


class Candidate(NamedTuple):
    """A picture that may have been trained on."""

    writer: str
    letter: str  # what it shows; of one's own pictures nothing is known
    picture: Picture
    member: bool


@dataclass(frozen=True)
class FinishedRun:
    """A finished run that is on trial."""

    folder: Path
    config: SimulationConfig
    base: str  # hash of the base that it trained on
    promise: str

    @property
    def name(self) -> str:
        """What it promised, and how long it trained."""
        return f"{self.promise}, {self.config.rounds} rounds of {self.config.adapter.shared.steps} steps"

    @property
    def arm(self) -> str:
        """What runs have in common that differ in their seed alone: they are judged together."""
        return json.dumps({**asdict(self.config), "seed": None, "resume": None}, sort_keys=True)


@dataclass(frozen=True, eq=False)
class RunGroup:
    """Runs that are judged together."""

    name: str
    runs: Sequence[FinishedRun]
    writers: int
    found: dict[str, MembershipResult]
    """By attack."""
    trials: dict[str, AttackTrial]


def load(folder: Path) -> FinishedRun:
    """The finished run in a folder; AntherError if there is none."""
    try:
        record: dict[str, Any] = json.loads((folder / RUN).read_text())
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        config, base_hash, epsilon = record["config"], record["assets"]["base"], summary["epsilon"]
    except OSError as error:
        raise AntherError(f"{folder}: no finished run here ({error.strerror}: {error.filename})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AntherError(f"{folder}: {RUN} or summary.json is damaged ({error})") from error
    found: SimulationConfig = to_object(OmegaConf.create(config), SimulationConfig)
    return FinishedRun(folder, found, base_hash, str(Guarantee(**epsilon)) if epsilon else "no differential privacy")


def candidates(data: DataConfig, took_part: Set[str]) -> list[Candidate]:
    """Members and others of a run, every picture once.

    Args:
        took_part: names of the devices that trained in any round.
    """
    own = own_pictures(data)
    found = [
        Candidate(name, "", picture, member and name in took_part)
        for name, pictures in own
        for member, split in ((True, pictures.train), (False, pictures.test))
        for picture in split
    ]
    people = writers(replace(data, validation=10, test=32))[: max(0, data.writers - len(own))]
    trained: dict[str, set[str]] = {person.name: set() for person in people}
    for device, writer, copy in assign_writers(people, data.devices or len(people)):
        if device in took_part:
            pictures = writer.pictures_for(device) if copy else writer.pictures
            trained[writer.name] |= {picture.caption for picture in pictures.train}
    for person in people:
        for picture in (*person.pool, *person.pictures.test):
            found.append(Candidate(person.name, picture.caption, picture, picture.caption in trained[person.name]))
    return found


def attack(runs: Sequence[FinishedRun], config: MembershipConfig, *, confidence: float, seed: int) -> RunGroup:
    """All attacks on runs that differ in their seed alone; each run's pictures are compared among themselves."""
    tried = [_tried(run, config) for run in runs]
    everyone = [(place, suspect) for place, (people, _) in enumerate(tried) for suspect in people]
    _, writer = np.unique([suspect.writer for _, suspect in everyone], return_inverse=True)
    _, letter = np.unique([f"{place} {suspect.letter}" for place, suspect in everyone], return_inverse=True)
    member = np.array([suspect.member for _, suspect in everyone])
    trials = {
        name: AttackTrial(np.concatenate([found[name] for _, found in tried]), member, writer, letter)
        for name in tried[0][1]
    }
    found = {
        name: judge(trial, resamples=config.resamples, confidence=confidence, seed=seed)
        for name, trial in trials.items()
    }
    return RunGroup(runs[0].name, runs, int(writer.max()) + 1, found, trials)


def _tried(run: FinishedRun, config: MembershipConfig) -> tuple[list[Candidate], dict[str, np.ndarray]]:
    """The pictures of a run, and their scores under each attack."""
    settings = run.config
    frozen = base.load(
        settings.base.path,
        sites=settings.adapter.sites,
        weights=settings.base.weights,
        device=settings.base.device,
        compute=settings.base.compute_dtype,
    )
    if frozen.hash != run.base:
        raise AntherError(f"{run.folder}: was trained on another base ({run.base[:12]}): restore it")
    state = checkpoint.load(run.folder / "checkpoints", sites=frozen.sites)
    if state is None:
        raise AntherError(f"{run.folder}: its checkpoints are gone, and with them the adapter to attack")
    people = candidates(settings.data, {name for name, facts in state.devices.items() if facts.steps})
    if len({suspect.member for suspect in people}) < 2:
        raise AntherError(f"{run.folder}: has no picture that it trained on, or none that it didn't")
    tried = {"best": state.best_adapter, "last": state.adapter}[config.adapter]
    (examples,) = encode(frozen, [EncodeJob(pictures=[suspect.picture for suspect in people])])
    if isinstance(examples, Exception):
        raise examples
    stacks = to_device(stack_adapters(frozen.sites, [tried]), frozen.like)
    granted = inference_share(budget(config.memory_gib, frozen.device))

    def scores(adapter: membership_scores.BatchedAdapter) -> MembershipScores:
        return membership_scores.scores(
            frozen, examples, adapter, timesteps=config.timesteps, time=config.time, memory=granted
        )

    own, alone = scores(stacks), scores({})
    beside = own.minus(alone)
    named = {ATTACKS[key]: value for key, value in own._asdict().items()}
    against = {AGAINST.format(ATTACKS[key]): value for key, value in beside._asdict().items()}
    return people, {**against, **named, CONTROL: alone.loss}
