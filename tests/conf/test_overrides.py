"""Paths and names on the command line are read as typed."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from conf.compose import compose
from conf.overrides import prepare_overrides, quote
from conf.schemas.simulation import SimulationConfig


def parsed(word: str) -> object:
    """Read an override as Hydra does; YAML's escape of an interpolation is undone on composition."""
    (override,) = OverridesParser.create().parse_overrides(prepare_overrides([word], SimulationConfig))
    value = override.value()
    text = value if isinstance(value, list) else str(value)
    return text if isinstance(text, list) else text.replace("\\${", "${")


FOLDERS = [
    "2024_01",
    "1e3",
    "null",
    "true",
    "写真",
    "Größe",
    "a=b",
    "Photos (1)",
    "my photos",
    "12:30:45",
    "50%",
    "#3",
    "a&b",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_text(folder: str) -> None:
    assert list(map(str, parsed(f"data.pictures=[{folder}]"))) == [folder]
    assert list(map(str, parsed(f"data.pictures=[{folder},x]"))) == [folder, "x"]


def test_composed_folders_are_text() -> None:
    assert compose([f"data.pictures=[{','.join(FOLDERS)}]"]).data.pictures == FOLDERS


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("data.pictures=['a, b',c]", ["a, b", "c"]),
        ("data.pictures=[]", []),
        ('data.pictures=["a"]', ["a"]),
    ],
)
def test_quoted_lists_stay(word: str, value: list[str]) -> None:
    assert compose([word]).data.pictures == value


@pytest.mark.integration
@pytest.mark.parametrize(("word", "value"), [("base.path=2024_01", "2024_01"), ("base.path=Größe", "Größe")])
def test_names_are_text(word: str, value: str) -> None:
    assert compose([word]).base.path == value
    assert compose([word, "adapter.sites=null"]).adapter.sites is None


def test_sweeps_groups_and_numbers_stay() -> None:
    words = ["base.path=a,b", "privacy=none,example", "rounds=1,2", "data.pictures=[a],[b]", "--multirun", "seed=1"]
    assert prepare_overrides(words, SimulationConfig) == ["--multirun", *words[:4], "seed=1"]


QUOTED = [
    "/home/Jürgen/outputs",
    "/srv/My Projects (old)/x",
    "/a/it's",
    "/a\\'b",
    "/back\\",
    "/$HOME/${x}",
    "/a=b",
    "/a,b",
    "/[x]",
    '/"q"',
    "/ünï/写真",
    "/a b/'c' \"d\"",
    "/x;rm -rf y",
    "/`id`",
]


@pytest.mark.parametrize("folder", QUOTED)
def test_folder_survives_shell_and_hydra(folder: str) -> None:
    typed = shlex.join([f"base.path={quote(folder)}"])
    (word,) = shlex.split(typed)
    assert parsed(word) == folder


def test_quoted_folders_compose() -> None:
    assert compose([f"data.pictures=[{','.join(map(quote, QUOTED))}]"]).data.pictures == QUOTED


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12))
def test_quote_round_trip(text: str) -> None:
    assert parsed(f"base.path={quote(text)}") == text


@pytest.mark.integration
def test_compose_takes_a_list() -> None:
    assert compose(["rounds=3", "data.writers=2"]) == compose("rounds=3 data.writers=2")
