"""Simulations of people of a data set: rounds, newcomers, evaluation, and resumption."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from client.device import Device
from client.rounds.handler import handle
from simulations.grid import cohort
from tests.helpers.people import character, characters, write
from tests.helpers.simulations import BARE, run
from typefaces.dataset import GLYPHS

pytestmark = pytest.mark.integration

MEMBERS, NEWCOMERS = ("ann", "bo", "cy"), ("New 1", "new-2")
FEW = ["data.train=3", "data.test=2", "rounds=2", "adapter.personal.steps=2", "tracker=none"]


def people(folder: Path) -> Path:
    test = characters(MEMBERS[:2], GLYPHS[:10], role="test")
    return write(folder / "people.parquet", test + characters([*MEMBERS[2:], *NEWCOMERS], GLYPHS[30:40], role="extra"))


def simulate(base: Path, folder: Path, *words: str) -> Any:
    """Run a simulation of the people in `folder`, without the number of writers that `TINY` sets."""
    with pytest.MonkeyPatch.context() as patch:
        from tests.helpers import simulations

        patch.setattr(simulations, "TINY", [word for word in simulations.TINY if not word.startswith("data.writers")])
        path = f"data.path={folder / 'people.parquet'}"
        return run(base, folder / "run", "data=people", path, *FEW, *words)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Requests that devices received, by their names."""
    received: dict[str, list[str]] = defaultdict(list)

    def recorded(request: Any, device: Device) -> Generator[Any, Any, Any]:
        received[device.name].append(type(request).__name__)
        return (yield from handle(request, device))

    monkeypatch.setattr(cohort, "handle", recorded)
    return received


@pytest.mark.parametrize(
    "words",
    [
        ("grid=serial", "aggregation=fedsa"),
        ("grid=cohort", "cohort.size=2", "privacy=example", "aggregation=fedit"),
        ("fleet=week", "aggregation=fedit"),
    ],
    ids=lambda words: words[0],
)
def test_newcomers_are_asked_in_no_round(
    words: tuple[str, ...], pipeline_folder: Path, tmp_path: Path, asked: dict[str, list[str]]
) -> None:
    people(tmp_path)
    done = simulate(pipeline_folder, tmp_path, f"data.newcomers=[{','.join(NEWCOMERS)}]", *BARE, *words)
    assert done.returncode == 0, done.stderr
    trained = {name for name, requests in asked.items() if "Train" in requests}
    assert trained
    assert trained <= set(MEMBERS)
    assert (asked["new-1"], asked["new-2"]) == (["Query", "Personalize"], ["Query", "Personalize"])
    assert all(requests.count("Personalize") == 1 for requests in asked.values())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["clients"], summary["judged"], summary["newcomers"]["judged"]) == (3, 3, 2)
    assert summary["newcomers"]["loss"]["personal"] > 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {row["name"]: row.get("newcomer", False) for row in evaluation} == dict.fromkeys(MEMBERS, False) | {
        "new-1": True,
        "new-2": True,
    }
    names = {file.name for file in (tmp_path / "run" / "adapters" / "personal").glob("new-*.with_shared.safetensors")}
    assert names == {"new-1.with_shared.safetensors", "new-2.with_shared.safetensors"}


def test_only_some_roles_are_evaluated(pipeline_folder: Path, tmp_path: Path) -> None:
    """Letters are judged; the page shows everyone that was evaluated."""
    people(tmp_path)
    words = "data.evaluated_roles=[test]", "data.newcomers=[new-2]", "evaluation.gallery_size=1"
    done = simulate(pipeline_folder, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [(row["name"], row["kind"], row["role"]) for row in rows] == [
        ("ann", "letters", "test"),
        ("bo", "letters", "test"),
        ("new-2", "letters", "extra"),
    ]
    assert all(0 <= row[arm]["legibility"] <= 1 for row in rows for arm in ("base", "local", "shared", "personal"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["clients"] == 4
    page = (tmp_path / "run" / "report.html").read_text()
    assert "letters, newcomer" in page
    assert "4 devices learned their own letters together, 1 joined later" in page
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["data"]
    assert (config["people"], config["newcomers"]) == (4, ["new-2"])


def test_too_few_people_of_a_role(pipeline_folder: Path, tmp_path: Path) -> None:
    people(tmp_path)
    words = {
        "evaluation.devices=3 data.evaluated_roles=[test]": "evaluation.devices=3: only 2 devices",
        "data.roles=[extra] data.evaluated_roles=[test]": "data.evaluated_roles: no device has role=test; roles of the "
        "devices are extra",
        "cohort.size=6": "cohort.size=6: there are only 5 devices",
        "data.newcomers=[ann] cohort.size=5": "cohort.size=5: there are only 4 devices",
        "data.newcomers=[ann] round_loop.quorum=5": "round_loop.quorum=5: there are 4 devices",
    }
    for word, message in words.items():
        done = simulate(pipeline_folder, tmp_path, *word.split())
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_resumed_with_the_same_pictures_only(pipeline_folder: Path, tmp_path: Path) -> None:
    file = people(tmp_path)
    words = "data.newcomers=[new-2]", "data.roles=[extra]", *BARE
    assert simulate(pipeline_folder, tmp_path, *words).returncode == 0
    before, original = (tmp_path / "run" / "evaluation.json").read_bytes(), file.read_bytes()
    again = simulate(pipeline_folder, tmp_path, *words, "resume=true")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == before
    others = characters(["zoe"], GLYPHS[:10], role="test")
    write(file, others + characters(["cy", *NEWCOMERS], GLYPHS[30:40], role="extra"))
    unrelated = simulate(pipeline_folder, tmp_path, *words, "resume=true")
    assert unrelated.returncode == 0, unrelated.stderr  # other people, who take no part
    for person in ("cy", "new-2"):
        rows = [
            character(person, GLYPHS[30 + i], sample=1, role="extra") if row["person"] == person else row
            for i, row in enumerate(characters([person], GLYPHS[30:40], role="extra"))
        ]
        rest = [name for name in ("cy", *NEWCOMERS) if name != person]
        write(file, rows + characters(rest, GLYPHS[30:40], role="extra"))
        refused = simulate(pipeline_folder, tmp_path, *words, "resume=true")
        assert refused.returncode == 2
        assert "was run with another set of pictures" in refused.stderr
    file.write_bytes(original)
    changed = simulate(pipeline_folder, tmp_path, *words[1:], "resume=true")
    assert "data.newcomers was ['new-2'], now" in changed.stderr
    write(file, characters(["dora", "cy", *NEWCOMERS], GLYPHS[30:40], role="extra"))
    more = simulate(pipeline_folder, tmp_path, *words, "resume=true")
    assert "data.people was 2, now 3" in more.stderr
