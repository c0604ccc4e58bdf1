"""Federations that `anther bench people measure` runs, by question.

Every run is a simulation with `data=people`. A run that answers several questions is made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.quality.people_data import (
    EXTRA,
    HELD_OUT,
    HandwritingPerson,
    by_donor,
    cohorts_of,
    folds,
    select,
    write_subset,
)
from bench.quality.people_local import LocalTask
from bench.quality.people_settings import LocalSettings, PeopleSettings, device_steps, with_steps
from common.seeding import derive_seed
from conf.compose import compose

COMMON = (
    "data=people",
    *(f"data.{split}={count}" for split, count in HELD_OUT.items()),
    "evaluation.baseline_local=false",
    "evaluation.gallery_size=0",
    "evaluation.timesteps=4",
    "tracker=none",
)
SHARED_ONLY = ("adapter.personal.steps=1", "adapter.personal.rank=1")  # the personal adapter isn't used


@dataclass(frozen=True)
class FederationRun:
    """One federation."""

    name: str
    """Name of its folder."""
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class PeopleExperiment:
    """People, settings and extent of all runs.

    Attributes:
        file: Parquet file of all people.
        people: its people.
        role: role of the people who are measured.
        settings: tuned settings.
        folder: folder of the runs, and of files of some people.
        words: further overrides of every run.
        seeds: seeds of the runs.
    """

    file: Path
    people: Sequence[HandwritingPerson]
    role: str
    settings: PeopleSettings
    folder: Path
    words: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def measured(self) -> list[HandwritingPerson]:
        """The people who are measured."""
        return select(self.people, self.role)

    def members(self, letters: int) -> list[HandwritingPerson]:
        """Return the members of a federation of everyone with enough letters, measured or extra."""
        measured, needed = select(self.people, self.role, letters), letters + sum(HELD_OUT.values())
        extra = {person for person in self.people if person.role == EXTRA and person.letters >= needed}
        return [person for person in self.people if person in {*measured, *extra}]

    def run(self, name: str, letters: int, seed: int, words: Sequence[str], file: Path | None = None) -> FederationRun:
        """Return a run of the people in a file.

        Args:
            name: name of the run.
            letters: training letters of each person.
            seed: seed of the run.
            words: its overrides.
            file: Parquet file of its people; None: the members with enough letters.
        """
        path = file or self.subset(f"letters-{letters}", [person.name for person in self.members(letters)])
        place = [f"data.path={path}", f"data.train={letters}", f"data.evaluated_roles=[{self.role}]"]
        return FederationRun(f"{name}-{seed}", (*COMMON, *place, f"seed={seed}", *words, *self.words))

    def federation(
        self, name: str, letters: int, seed: int, words: Sequence[str] = (), file: Path | None = None
    ) -> FederationRun:
        """Return a run with the tuned settings; arguments as for `run`, with `words` added to the settings."""
        return self.run(name, letters, seed, [*self.settings.overrides(letters), *words], file)

    def local(
        self, letters: int, seed: int, settings: Sequence[LocalSettings], total: int, *, grid: bool = False
    ) -> LocalTask:
        """Return the training of the measured people without others.

        Args:
            letters: training letters of each person.
            seed: seed of the training.
            settings: settings, all with the same sites.
            total: steps of the curve.
            grid: whether settings are only compared.
        """
        file = self.subset(f"measured-{letters}", [person.name for person in select(self.people, self.role, letters)])
        base = [word for word in self.settings.federation if word.startswith(("base.", "base=", "evaluation."))]
        words = (*COMMON, f"data.path={file}", f"data.train={letters}", f"seed={seed}", *base, *self.words)
        return LocalTask(words, tuple(settings), total, self.settings.every, grid)

    def total_steps(self, letters: int) -> int:
        """Return the optimizer steps of a member's device, which training without others gets too."""
        config = compose(list(self.federation("", letters, 0).overrides))
        return max(1, round(device_steps(config, len(self.members(letters))).total))

    def subset(self, name: str, names: Sequence[str]) -> Path:
        """Write a file of some people; its name depends on them."""
        key = derive_seed(str(self.file), self.file.stat().st_size, *sorted(names))
        return write_subset(self.file, names, self.folder / "data" / f"{self.role}-{name}-{key:016x}.parquet")


def member_runs(experiment: PeopleExperiment, letters: int) -> list[FederationRun]:
    """Return the federations of everyone, one for each seed."""
    return [experiment.federation(f"letters-{letters}", letters, seed) for seed in experiment.seeds]


def newcomer_runs(experiment: PeopleExperiment, letters: int, count: int) -> dict[str, FederationRun]:
    """Return a federation for each fold of the measured people, who join it after its rounds.

    Args:
        experiment: the experiment.
        letters: training letters of each person.
        count: number of folds.
    """
    return {
        f"fold {number + 1}": _joined(experiment, f"newcomers-{number}", letters, names)
        for number, names in enumerate(folds(select(experiment.people, experiment.role, letters), count))
    }


def donor_runs(experiment: PeopleExperiment, letters: int, fewest: int = 5) -> dict[str, FederationRun]:
    """Return a federation without each donor, whose measured people join it after its rounds.

    Args:
        experiment: the experiment.
        letters: training letters of each person.
        fewest: smallest number of measured people of a donor.
    """
    members, runs = experiment.members(letters), {}
    measured = [person for person in members if person.role == experiment.role]
    for donor, names in by_donor(measured, fewest).items():
        others = [person for person in members if person.donor != donor]
        if any(person.role == experiment.role for person in others):
            file = experiment.subset(f"without-{donor}", [*(person.name for person in others), *names])
            runs[donor] = _joined(experiment, f"donor-{donor}", letters, names, file)
    return runs


def _joined(
    experiment: PeopleExperiment, name: str, letters: int, newcomers: Sequence[str], file: Path | None = None
) -> FederationRun:
    """Return a federation that people join after its rounds. One member is evaluated, the least that a run allows."""
    words = [f"data.newcomers=[{','.join(newcomers)}]", "evaluation.devices=1"]
    return experiment.federation(name, letters, experiment.seeds[0], words, file)


def private_runs(experiment: PeopleExperiment, letters: int) -> dict[str, list[FederationRun]]:
    """Return the reference without privacy and the private federations, one for each seed.

    Args:
        experiment: the experiment.
        letters: training letters of each person.
    """
    forms = {"reference": experiment.settings.reference, **experiment.settings.private}
    return {
        form: [experiment.run(f"private-{form}", letters, seed, [*words, *SHARED_ONLY]) for seed in experiment.seeds]
        for form, words in forms.items()
    }


def letter_runs(experiment: PeopleExperiment, numbers: Sequence[int]) -> dict[int, FederationRun]:
    """Return federations of the measured people only, by number of letters: others have too few for the largest.

    Args:
        experiment: the experiment.
        numbers: numbers of training letters.
    """
    names = [person.name for person in select(experiment.people, experiment.role, max(numbers))]
    file = experiment.subset("only", names)
    return {n: experiment.federation(f"only-{n}", n, experiment.seeds[0], file=file) for n in numbers}


def step_runs(experiment: PeopleExperiment, letters: int, numbers: Sequence[int]) -> dict[int, FederationRun]:
    """Return federations of everyone, by total number of steps of a device.

    Args:
        experiment: the experiment.
        letters: training letters of each person.
        numbers: total numbers of steps.
    """
    members = len(experiment.members(letters))
    config = compose(list(member_runs(experiment, letters)[0].overrides))
    return {
        n: experiment.federation(f"steps-{n}", letters, experiment.seeds[0], with_steps(config, members, n))
        for n in numbers
    }


def size_runs(
    experiment: PeopleExperiment, letters: int, sizes: Sequence[int], panel: int
) -> dict[int, list[FederationRun]]:
    """Return federations by number of people, in which the same panel of measured people takes part.

    Args:
        experiment: the experiment.
        letters: training letters of each person.
        sizes: numbers of people.
        panel: number of people in the panel.
    """
    first = panel_of(experiment, letters, panel)
    names = [*first, *(person.name for person in experiment.members(letters) if person.name not in first)]
    runs = {}
    for size in sizes:
        cohorts = cohorts_of(first, names[len(first) :], size)
        runs[size] = [
            experiment.federation(
                f"people-{size}-{number}",
                letters,
                experiment.seeds[0],
                file=experiment.subset(f"people-{size}-{number}", cohort),
            )
            for number, cohort in enumerate(cohorts)
        ]
    return runs


def panel_of(experiment: PeopleExperiment, letters: int, count: int) -> list[str]:
    """Return the first measured people with enough letters.

    Args:
        experiment: the experiment.
        letters: training letters of each person.
        count: number of people.
    """
    return [person.name for person in select(experiment.people, experiment.role, letters)[:count]]
