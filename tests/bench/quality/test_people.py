"""Tests of `anther bench people`: a complete measurement of a few people, and errors of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from bench.quality import people_work
from bench.quality.people import main
from bench.quality.people_data import read_people
from bench.quality.people_measure import Extent, measure
from bench.quality.people_plan import PeopleExperiment
from bench.quality.people_settings import LocalSettings, PeopleSettings
from bench.quality.people_tune import tune
from bench.quality.people_work import Workers
from models.files import assets
from tests.helpers.people import characters, write
from typefaces.dataset import GLYPHS

SETTINGS = PeopleSettings(
    federation=("aggregation=fedit", "rounds=2", "adapter.shared.steps=1", "adapter.personal.steps=2"),
    reference=("aggregation=fedit", "rounds=1", "adapter.shared.steps=1", "adapter.shared.lr=0.01"),
    private={"device-8": ("aggregation=fedit", "rounds=1", "privacy=device", "adapter.shared.lr=0.01")},
    local={"2": LocalSettings(rank=2, steps=2, prior=0.5)},
    every=2,
)
WORDS = ("base.device=cpu", "adapter.shared.rank=2", "adapter.personal.rank=2", "adapter.shared.batch_size=1")
EXTENT = Extent(headline=2, few=1, letters=(1, 2), steps=(2,), sizes=(2,), panel=3, folds=2, donors=1)


class InlineExecutor(Executor):
    """Runs each task at once, in this process."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **options))
        return future


@pytest.fixture(scope="module")
def people_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        row
        for name, role in (("a-1", "development"), ("a-2", "development"), ("b-1", "development"), ("c-1", "extra"))
        for row in characters([name], GLYPHS[10:32], role=role)
    ]
    return write(tmp_path_factory.mktemp("people") / "people.parquet", rows)


def experiment(file: Path, base: Path, folder: Path) -> PeopleExperiment:
    words = (*WORDS, f"base.path={base}", "evaluation.timesteps=1", "evaluation.sampling_steps=1")
    return PeopleExperiment(file, read_people(file), "development", SETTINGS, folder, words, (0,))


@pytest.mark.stress
def test_every_block_is_measured(people_file: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    workers = Workers(tmp_path, 1, InlineExecutor())
    inputs = experiment(people_file, pipeline_folder, tmp_path), workers, EXTENT
    blocks = ["members", "steps", "newcomers", "donors", "letters", "people", "private", "pictures"]
    former = {"former_base": pipeline_folder, "former_judge": assets.locate("judge")}
    results = measure(*inputs, blocks, **former, sheet=tmp_path / "sheet.png")
    head = results["letters-2"]
    assert (head["people"], head["members"], results["letters-1"]["members"]) == (3, 4, 4)
    assert set(head["arms"]) == {"shared", "personal", "local", "local, best step"}
    assert head["arms"]["local"]["gain"][0] <= head["arms"]["local, best step"]["gain"][0]
    assert results["newcomers"]["people"] == 3
    assert list(results["donors"]["groups"]) == ["a", "b"]
    assert list(results["people"]) == ["2", "4"]
    assert {point["people"] for point in results["people"].values()} == {3}
    assert list(results["steps"]["federation"]) == ["2.0", "4.0"]
    assert list(results["letters"]["local"]) == ["1", "2"]
    assert results["private"]["reference"]["share"][0] == 1
    assert results["private"]["device-8"]["epsilon"]["unit"] == "device"
    read = results["pictures"]["shipped"]["read"]
    assert all(0 <= read[arm][0] <= 1 for arm in ("real", "base", "local", "personal"))
    assert results["pictures"]["former"]["read"] == results["pictures"]["shipped"]["read"]
    assert results["former base"]["arms"] == head["arms"]
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.integration
def test_finished_runs_are_kept(
    people_file: Path, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(tmp_path, 1, InlineExecutor())
    people = experiment(people_file, pipeline_folder, tmp_path)
    plain = dataclasses.replace(SETTINGS, local={"2": LocalSettings(rank=2, steps=2)})
    inputs = dataclasses.replace(people, settings=plain), workers, EXTENT, []
    first = measure(*inputs, sheet=tmp_path / "sheet.png")
    monkeypatch.setattr(people_work, "train_people", None)
    monkeypatch.setattr("simulations.run.simulate", None)
    assert measure(*inputs, sheet=tmp_path / "sheet.png") == first
    other = dataclasses.replace(inputs[0], settings=dataclasses.replace(plain, every=1))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        measure(other, *inputs[1:], sheet=tmp_path / "sheet.png")


@pytest.mark.integration
def test_settings_are_tuned(people_file: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    workers = Workers(tmp_path, 1, InlineExecutor())
    people = experiment(people_file, pipeline_folder, tmp_path)
    grid = ["adapter.personal.lr=0.001,0.01"]
    settings, scores = tune(people, workers, ["federation"], grid=grid, headline=(2,))
    rows = scores["federation"]
    best = min(rows, key=lambda row: row["personal"])
    assert len(rows) == 2
    assert settings.by_letters == {"2": tuple(best["overrides"])}
    assert settings.local == SETTINGS.local


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["measure", "nothing.parquet"], "nothing.parquet"),
        (["measure", "{file}", "--role", "other"], "--role other: no person of this role has 20 letters"),
        (["measure", "{file}", "--settings", "missing.json"], "missing.json"),
        (["measure", "{file}", "--out", "bench/results/people.json"], "is for results of --role test"),
        (["page", "--results", "missing.json"], "missing.json"),
    ],
)
def test_errors_are_one_line(
    words: list[str],
    message: str,
    people_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bench.quality.people.open_workers", None)
    out = [] if words[0] == "page" else ["--runs", str(tmp_path)]
    assert main([word.format(file=people_file) for word in words] + out) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
