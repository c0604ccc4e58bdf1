"""Membership inference attacks on the shared adapter of finished runs, by an adversary who also has the base.

Members are pictures on devices that participated. Non-members are pictures of the same writers that the run did not
use: test pictures and the unused part of the training pool, without the pictures that selected the best round. Pictures
    were
split by the writer's name only, independently of their content. Since letters are not split evenly, members are
compared with non-members of the same letter (`privacy.audit.membership`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from common.errors import AntherError
from common.plugins import allow_installed_plugins
from conf.cli import to_object
from conf.components import as_settings
from conf.schemas.audit import MembershipConfig
from conf.schemas.simulation import DataConfig, SimulationConfig
from models.base import base
from models.lora.batched_lora import stack_adapters, to_device
from privacy.accounting import Guarantee
from privacy.audit.membership import AttackTrial, MembershipResult, judge
from server.rounds import checkpoint
from simulations.fleet.people import load_people
from simulations.fleet.writers import LETTERS, assign_writers, own_pictures, writers
from simulations.run_dir import RUN, stored_settings
from training import membership_scores
from training.capacity import budget, inference_share
from training.engine import encode
from training.jobs import EncodeJob, Picture
from training.membership_scores import MembershipScores

CONTROL = "loss, base alone"  # stored; don't change
"""Attack without access to the run. Its apparent success is due to the selection of pictures."""
ATTACKS = {"loss": "loss", "pia": "PIA", "sima": "SimA"}
RELATIVE = "{} against the base"  # stored; don't change


class Candidate(NamedTuple):
    """Picture that may have been trained on."""

    writer: str
    letter: str  # shown letter; empty for users' own pictures
    picture: Picture
    member: bool


@dataclass(frozen=True)
class FinishedRun:
    """Finished run to attack."""

    folder: Path
    config: SimulationConfig
    base: str  # hash of its base
    guarantee: str

    @property
    def name(self) -> str:
        """Guarantee and duration of the run."""
        return f"{self.guarantee}, {self.config.rounds} rounds of {self.config.adapter.shared.steps} steps"

    @property
    def group_key(self) -> str:
        """Return the configuration without the seed: runs that differ only in their seed form one group."""
        settings = {**as_settings(self.config), "robust": list(self.config.robust.items())}  # their order counts
        return json.dumps({**settings, "seed": None, "resume": None}, sort_keys=True)


@dataclass(frozen=True, eq=False)
class RunGroup:
    """Attack results of runs that differ only in their seed."""

    name: str
    runs: Sequence[FinishedRun]
    writers: int
    attacks: dict[str, MembershipResult]
    """Results by attack."""
    trials: dict[str, AttackTrial]


def load(folder: Path) -> FinishedRun:
    """Load the finished run in a folder; AntherError if there is none."""
    try:
        record: dict[str, Any] = json.loads((folder / RUN).read_text())
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        config = stored_settings(record["config"])
        base_hash, epsilon = record["assets"]["base"], summary["epsilon"]
    except OSError as error:
        raise AntherError(f"{folder}: no finished run here ({error.strerror}: {error.filename})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AntherError(f"{folder}: {RUN} or summary.json is damaged ({error})") from error
    loaded: SimulationConfig = to_object(OmegaConf.create(config), SimulationConfig)
    return FinishedRun(folder, loaded, base_hash, str(Guarantee(**epsilon)) if epsilon else "no differential privacy")


def candidates(data: DataConfig, participated: Set[str]) -> list[Candidate]:
    """List members and non-members of a run, each picture once.

    Args:
        data: data of the run.
        participated: names of the devices that trained in any round.
    """
    if data.path is not None:
        return _candidates_of_people(data, participated)
    folders = own_pictures(data)
    all_candidates = [
        Candidate(name, "", picture, member and name in participated)
        for name, pictures in folders
        for member, split in ((True, pictures.train), (False, pictures.test))
        for picture in split
    ]
    people = writers(replace(data, validation=10, test=32))[: max(0, data.writers - len(folders))]
    trained: dict[str, set[str]] = {person.name: set() for person in people}
    for device, writer, copy in assign_writers(people, data.devices or len(people)):
        if device in participated:
            pictures = writer.pictures_for(device) if copy else writer.pictures
            trained[writer.name] |= {picture.caption for picture in pictures.train}
    for person in people:
        for picture in (*person.pool, *person.pictures.test):
            member = picture.caption in trained[person.name]
            all_candidates.append(Candidate(person.name, picture.caption, picture, member))
    return all_candidates


def _candidates_of_people(data: DataConfig, participated: Set[str]) -> list[Candidate]:
    """List the training and test pictures of a data set's people."""
    return [
        Candidate(person.name, picture.caption if person.kind == LETTERS else "", picture, member)
        for person in load_people(data).members
        for member, split in ((person.name in participated, person.pictures.train), (False, person.pictures.test))
        for picture in split
    ]


def attack(runs: Sequence[FinishedRun], config: MembershipConfig, *, confidence: float, seed: int) -> RunGroup:
    """Run all attacks on runs that differ only in their seed; pictures are compared within each run.

    Args:
        runs: the runs.
        config: which adapter to attack, and how.
        confidence: confidence level of the intervals.
        seed: seed of the bootstrap.
    """
    scored = [_score_run(run, config) for run in runs]
    everyone = [(index, candidate) for index, (people, _) in enumerate(scored) for candidate in people]
    _, writer = np.unique([candidate.writer for _, candidate in everyone], return_inverse=True)
    _, letter = np.unique([f"{index} {candidate.letter}" for index, candidate in everyone], return_inverse=True)
    member = np.array([candidate.member for _, candidate in everyone])
    trials = {
        name: AttackTrial(np.concatenate([scores[name] for _, scores in scored]), member, writer, letter)
        for name in scored[0][1]
    }
    results = {
        name: judge(trial, resamples=config.bootstrap_samples, confidence=confidence, seed=seed)
        for name, trial in trials.items()
    }
    return RunGroup(runs[0].name, runs, int(writer.max()) + 1, results, trials)


def _score_run(run: FinishedRun, config: MembershipConfig) -> tuple[list[Candidate], dict[str, np.ndarray]]:
    """Return the candidates of a run and their scores [candidates] by attack."""
    settings = run.config
    allow_installed_plugins()
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
        raise AntherError(f"{run.folder}: its checkpoints, with the adapter to attack, are missing: restore them")
    people = candidates(settings.data, {name for name, metrics in state.devices.items() if metrics.steps})
    if len({candidate.member for candidate in people}) < 2:
        raise AntherError(f"{run.folder}: has no picture that it trained on, or none that it didn't")
    adapter = {"best": state.best_adapter, "last": state.adapter}[config.adapter]
    (examples,) = encode(frozen, [EncodeJob(pictures=[candidate.picture for candidate in people])])
    if isinstance(examples, Exception):
        raise examples
    stacks = to_device(stack_adapters(frozen.sites, [adapter]), frozen.like)
    memory = inference_share(budget(config.memory_gib, frozen.device))

    def scores(adapter: membership_scores.BatchedAdapter) -> MembershipScores:
        return membership_scores.scores(
            frozen, examples, adapter, timesteps=config.timesteps, time=config.timestep_fraction, memory=memory
        )

    with_adapter, base_only = scores(stacks), scores({})
    absolute = {ATTACKS[key]: value for key, value in with_adapter._asdict().items()}
    relative = {RELATIVE.format(ATTACKS[key]): value for key, value in with_adapter.minus(base_only)._asdict().items()}
    return people, {**relative, **absolute, CONTROL: base_only.loss}
