"""Run all federations and trainings of `anther bench people measure`, and compute its results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.quality import people_plan as plan
from bench.quality import people_results as statistics
from bench.quality.people_local import LocalTask
from bench.quality.people_pictures import DrawingTask, draw
from bench.quality.people_plan import FederationRun, PeopleExperiment
from bench.quality.people_settings import DeviceSteps, device_steps
from bench.quality.people_work import Workers
from conf.compose import compose
from simulations.fleet.writers import slug

BLOCKS = ("members", "steps", "newcomers", "donors", "private", "letters", "people", "pictures")
SHIPPED, FORMER = "shipped", "former"


@dataclass(frozen=True)
class Extent:
    """Extent of a measurement."""

    headline: int = 5
    """Training letters of each person, in every block but the curve over letters."""
    few: int = 2
    """Letters of the second comparison."""
    letters: tuple[int, ...] = (1, 2, 5, 10, 20)
    steps: tuple[int, ...] = (5, 10, 20, 40, 80, 120)
    sizes: tuple[int, ...] = (10, 20, 40, 80, 160)
    panel: int = 40
    folds: int = 4
    donors: int = 5
    """Smallest number of measured people of a donor that is left out."""


class Measurement:
    """All runs of one experiment. A run starts when it is first asked for, and is shared by all blocks."""

    def __init__(self, experiment: PeopleExperiment, workers: Workers, extent: Extent) -> None:
        self.experiment, self.workers, self.extent = experiment, workers, extent
        self.federations: dict[str, Future[dict[str, Any]]] = {}
        self.trainings: dict[str, Future[list[dict[str, Any]]]] = {}

    def federation(self, run: FederationRun) -> Future[dict[str, Any]]:
        """Start a federation once."""
        if run.name not in self.federations:
            self.federations[run.name] = self.workers.federation(run)
        return self.federations[run.name]

    def local(self, letters: int, seed: int) -> Future[list[dict[str, Any]]]:
        """Start the training without others once."""
        name = f"local-{letters}-{seed}"
        if name not in self.trainings:
            self.trainings[name] = self.workers.local(name, self.local_task(letters, seed))
        return self.trainings[name]

    def local_task(self, letters: int, seed: int) -> LocalTask:
        """Return the tuned training without others."""
        settings = self.experiment.settings.local_for(letters)
        return self.experiment.local(letters, seed, [settings], self.experiment.total_steps(letters))

    def members(self, letters: int) -> tuple[list[Future[dict[str, Any]]], list[Future[list[dict[str, Any]]]]]:
        """Start the federations of everyone and the training without others, for all seeds."""
        runs = plan.member_runs(self.experiment, letters)
        return [self.federation(run) for run in runs], [self.local(letters, seed) for seed in self.experiment.seeds]

    def start(self, blocks: Collection[str]) -> dict[str, Any]:
        """Start the runs of some blocks; return their futures by block."""
        experiment, extent = self.experiment, self.extent
        headline = extent.headline
        started: dict[str, Any] = {"headline": self.members(headline)}
        if "private" in blocks:
            forms = plan.private_runs(experiment, headline)
            started["private"] = {form: [self.federation(run) for run in runs] for form, runs in forms.items()}
        if "members" in blocks:
            started["few"] = self.members(extent.few)
        for block, runs in (
            ("newcomers", lambda: plan.newcomer_runs(experiment, headline, extent.folds)),
            ("donors", lambda: plan.donor_runs(experiment, headline, extent.donors)),
            ("letters", lambda: plan.letter_runs(experiment, extent.letters)),
            ("steps", lambda: plan.step_runs(experiment, headline, self._step_points())),
        ):
            if block in blocks:
                started[block] = {key: self.federation(run) for key, run in runs().items()}
        if "people" in blocks:
            members = len(experiment.members(headline))
            sizes = [size for size in extent.sizes if size < members]
            curve = plan.size_runs(experiment, headline, sizes, extent.panel)
            started["people"] = {size: [self.federation(run) for run in runs] for size, runs in curve.items()}
            started["people"][members] = [started["headline"][0][0]]
        if "letters" in blocks:
            started["local letters"] = {n: self.local(n, experiment.seeds[0]) for n in extent.letters}
        return started

    def draw(self, judges: Mapping[str, Path | None], sheet: Path) -> list[Future[dict[str, Any]]]:
        """Draw with the adapters of finished headline runs, for all seeds.

        Args:
            judges: folder of each judge; None: the shipped one.
            sheet: path of the picture with drawings of the first seed.
        """
        experiment, letters = self.experiment, self.extent.headline
        sites = experiment.settings.local_for(letters).sites
        tasks = [
            DrawingTask(
                overrides=self.workers.with_memory(run.overrides),
                folder=self.workers.federation_folder(run),
                local=self.workers.local_folder(f"local-{letters}-{seed}", self.local_task(letters, seed)),
                local_sites=sites,
                judges=judges,
                sheet=sheet if seed == experiment.seeds[0] else None,
            )
            for run, seed in zip(plan.member_runs(experiment, letters), experiment.seeds, strict=True)
        ]
        return [self.workers.call(draw, task) for task in tasks]

    def _step_points(self) -> list[int]:
        total = self.experiment.total_steps(self.extent.headline)
        return [step for step in self.extent.steps if step < total]


def measure(
    experiment: PeopleExperiment,
    workers: Workers,
    extent: Extent,
    blocks: Collection[str] = BLOCKS,
    *,
    former_base: Path | None = None,
    former_judge: Path | None = None,
    sheet: Path,
) -> dict[str, Any]:
    """Run what some blocks need, and return their results.

    Args:
        experiment: people, settings and seeds.
        workers: processes that run everything.
        extent: extent of the blocks.
        blocks: names from `BLOCKS`; the headline is always measured.
        former_base: folder of a second base, whose headline is shown beside.
        former_judge: folder of a second judge.
        sheet: path of the picture with drawings.
    """
    measurement = Measurement(experiment, workers, extent)
    started = measurement.start(blocks)
    former = None
    if former_base:
        words = (*experiment.words, f"base.path={former_base.resolve()}")
        second = replace(workers, folder=workers.folder / FORMER)
        former = Measurement(replace(experiment, words=words), second, extent).members(extent.headline)
    runs, local = _results(started["headline"][0]), [records[0] for records in _results(started["headline"][1])]
    results: dict[str, Any] = {f"letters-{extent.headline}": statistics.members_block(runs, local)}
    drawings = measurement.draw(_judges(former_judge), sheet) if "pictures" in blocks else []
    if "few" in started:
        few_runs, few_local = started["few"]
        few = statistics.members_block(_results(few_runs), [records[0] for records in _results(few_local)])
        results[f"letters-{extent.few}"] = few
    if "steps" in started:
        curve = {_steps(experiment, extent, step): run for step, run in _named(started["steps"]).items()}
        curve[float(experiment.total_steps(extent.headline))] = runs[0]
        results["steps"] = statistics.steps_block(curve, local[0])
    steps = _device_steps(experiment, plan.member_runs(experiment, extent.headline)[0], extent.headline)
    results[f"letters-{extent.headline}"]["steps"] = steps._asdict()
    for block in ("newcomers", "donors"):
        if started.get(block):
            joined = _named(started[block])
            results[block] = statistics.joined_block(joined, runs[0])
            results[block] |= {
                "steps": steps.personal,
                **statistics.steps_of_newcomers(joined, local[0], steps.personal),
            }
    if "private" in started:
        forms = {form: _results(futures) for form, futures in started["private"].items()}
        results["private"] = statistics.private_block(forms)
    if "letters" in started:
        records = {n: future.result()[0] for n, future in started["local letters"].items()}
        letter_runs = _named(started["letters"])
        results["letters"] = {
            "federation": statistics.curve_block({n: [run] for n, run in letter_runs.items()}),
            "local": statistics.local_curve_block(records, statistics.measured(letter_runs[extent.letters[0]])),
        }
    if "people" in started:
        names = [slug(name) for name in plan.panel_of(experiment, extent.headline, extent.panel)]
        curve_runs = {size: _results(futures) for size, futures in started["people"].items()}
        results["people"] = statistics.curve_block(curve_runs, names)
    if drawings:
        results["pictures"] = statistics.pictures_block(_results(drawings))
    if former:
        former_local = [records[0] for records in _results(former[1])]
        results["former base"] = statistics.members_block(_results(former[0]), former_local)
    return results


def _steps(experiment: PeopleExperiment, extent: Extent, wanted: int) -> float:
    """Return the steps that a run of the curve really takes."""
    run = plan.step_runs(experiment, extent.headline, [wanted])[wanted]
    return _device_steps(experiment, run, extent.headline).total


def _device_steps(experiment: PeopleExperiment, run: FederationRun, letters: int) -> DeviceSteps:
    return device_steps(compose(list(run.overrides)), len(experiment.members(letters)))


def _judges(former: Path | None) -> dict[str, Path | None]:
    return {SHIPPED: None, **({FORMER: former} if former else {})}


def _results(futures: Sequence[Future[Any]]) -> list[Any]:
    return [future.result() for future in futures]


def _named(futures: Mapping[Any, Future[Any]]) -> dict[Any, Any]:
    return {key: future.result() for key, future in futures.items()}
