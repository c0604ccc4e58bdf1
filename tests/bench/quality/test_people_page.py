"""Tests of docs/people.md, made from small results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from bench.quality.people_aims import check_aims
from bench.quality.people_page import sheet_of, write_page
from common.errors import AntherError

GAIN = {"loss": [0.2, 0.19, 0.21], "gain": [0.02, 0.01, 0.03], "relative_gain": [0.123, 0.1, 0.15]}
HEAD = {
    "people": 119,
    "members": 240,
    "base": [0.2, 0.19, 0.21],
    "arms": {"shared": GAIN, "personal": GAIN, "local": GAIN, "local, best step": GAIN},
    "ratio": [1.51, 1.4, 1.6],
    "oracle_ratio": [1.2, 1.1, 1.3],
    "better": [0.97, 0.93, 1.0],
}
SHARE = {"people": 30, "share": [0.91, 0.88, 0.94]}
RESULTS: dict[str, Any] = {
    "letters-5": HEAD,
    "letters-2": {**HEAD, "ratio": [1.77, 1.6, 1.9]},
    "steps": {"fraction": [0.33, 0.3, None], "federation": {"10.0": GAIN, "150.0": GAIN}, "local": {"150": GAIN}},
    "newcomers": {**SHARE, "steps": 50, "fraction": 0.625, "groups": {"fold 1": SHARE}},
    "donors": {**SHARE, "groups": {"tos": SHARE}},
    "private": {
        "reference": {"share": [1.0, 1.0, 1.0], "epsilon": None, "rounds": 40},
        "example-8": {
            "share": [0.6, 0.5, 0.7],
            "epsilon": {"value": 7.98, "delta": 1e-3, "unit": "image"},
            "rounds": 25,
        },
    },
    "letters": {"federation": {"1": GAIN, "5": GAIN}, "local": {"1": GAIN}},
    "people": {"10": {"people": 40, **GAIN}, "240": {"people": 40, **GAIN}},
    "pictures": {
        "shipped": {
            "read": {arm: [0.8, 0.7, 0.9] for arm in ("real", "base", "local", "personal")},
            "style": {arm: [0.9, 0.8, 1.0] for arm in ("real", "base", "local", "personal")},
            "read_ratio": [1.0, 0.9, 1.1],
        }
    },
}


def write(folder: Path, results: dict[str, Any] = RESULTS, role: str = "test") -> Path:
    aims = check_aims(results)
    record = {"role": role, "results": results, "aims": aims, "command": "anther bench people measure", "seeds": [0, 1]}
    (folder / "people.json").write_text(json.dumps(record))
    return folder / "people.json"


def test_page_answers_first(tmp_path: Path) -> None:
    file = write(tmp_path)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(sheet_of(file))
    text = write_page(file, tmp_path / "docs").read_text()
    answers = text.partition("## Aims")[0]
    assert answers.index("**5 letters of each person**") < answers.index("**2 letters of each person**")
    numbers = ("1.51 [1.40, 1.60]", "1.77 [1.60, 1.90]", "33% [30%, –]", "240: 12.3%", "91% [88%, 94%]", "5: 12.3%")
    for shown in (*numbers, "With 62% of the steps"):
        assert shown in answers, shown
    assert "| example-8 | 7.98 | 0.001 | image | 25 | 60% [50%, 70%] |" in text
    assert "| 5 letters: fraction of people with a lower loss than locally | ≥ 0.97 | 0.97 [0.93, 1.00] | met |" in text
    assert "**missed**" in text
    assert "![Drawn letters of six people](people-drawings.png)" in text
    assert (tmp_path / "docs" / "people-drawings.png").exists()
    circles = list(
        ElementTree.parse(tmp_path / "docs" / "people-curves.svg").iter("{http://www.w3.org/2000/svg}circle")
    )
    assert len(circles) == 2 + 1 + 2 + 1 + 2


def test_page_of_one_block(tmp_path: Path) -> None:
    text = write_page(write(tmp_path, {"letters-5": HEAD}), tmp_path).read_text()
    assert "people-curves.svg" not in text
    assert "people-drawings.png" not in text
    assert "How long" not in text


def test_page_needs_test_people(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match=r"results of role=development; the page needs those of --role test"):
        write_page(write(tmp_path, role="development"), tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
    (tmp_path / "people.json").write_text("{}")
    with pytest.raises(AntherError, match="holds no results of people"):
        write_page(tmp_path / "people.json", tmp_path)
