"""`key=value` without Hydra: text is read verbatim, other values by the type of their key."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common.errors import AntherError
from conf.key_value import parse_override
from conf.schemas.node import NodeConfig, compose
from conf.schemas.planning import PlanConfig

VERBATIM = [
    "2024_01",
    "007",
    "1e3",
    "on",
    "off",
    "yes",
    "no",
    "12:30:45",
    "/srv/Album #3",
    "~",
    "null ",
    "[1,2]",
    "{a: b}",
    "a: b",
    "'x'",
    '"x"',
    "${oc.env:HOME}",
    "\\${x}",
    "$${",
    "!!python/object:x",
    "& * ?",
    "写真",
    "=",
    "a=b",
    "- x",
]


def read(*words):
    return compose(words, Path("none"))


@pytest.mark.parametrize("value", VERBATIM)
@pytest.mark.parametrize("key", ["data", "store"])
def test_texts_are_verbatim(key, value):
    assert getattr(read(f"{key}={value}"), key) == value


@pytest.mark.integration
@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=30))
def test_any_text_is_verbatim(value):
    word = f"fetch.folder={value}"
    if value == "null" or not word.isprintable():
        return
    assert read(word).fetch.folder == value


def test_null_is_none_if_optional():
    assert read("data=x", "data=null").data is None
    assert read("weights=int8").weights == "int8"
    with pytest.raises(AntherError, match="weights"):
        read("weights=null")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("max_rank=7", 7),
        ("max_rank=null", None),
        ("test=true", True),
        ("test=on", True),
        ("uplink_mbps=1e3", 1000.0),
        ("throttle.max_celsius=null", None),
    ],
)
def test_other_values_have_their_type(word, value):
    read_value = read(word)
    for part in word.partition("=")[0].split("."):
        read_value = getattr(read_value, part)
    assert read_value == value
    assert type(read_value) is type(value)


@pytest.mark.parametrize(
    "word", ["max_rank=abc", "max_rank=12:30:45", "test=maybe", "throttle.max_wait_seconds=12:30:45", "max_rank=1.5"]
)
def test_wrong_types_are_refused(word):
    with pytest.raises(AntherError, match=word.partition("=")[0].replace(".", r"\.")):
        read(word)


@pytest.mark.parametrize("word", ["x", "=x", "data=a\nconnection.insecure=true", "data=\x1b[2J"])
def test_malformed_word_is_refused(word):
    with pytest.raises(AntherError):
        parse_override(word, NodeConfig)


def test_unknown_keys_are_explained(tmp_path):
    with pytest.raises(AntherError, match="guard"):
        compose(["guard.batery=1"], tmp_path / "none")
    with pytest.raises(AntherError, match="data"):
        compose(["data.x=1"], tmp_path / "none")


@pytest.mark.parametrize("name", ["a/b", "..", ""])
def test_a_name_is_no_path(name, tmp_path):
    with pytest.raises(AntherError, match="must not be a path"):
        compose([f"name={name}"], tmp_path / "none")


@pytest.mark.parametrize("key", ["data", "store", "base"])
def test_empty_folder_is_refused(key, tmp_path):
    """An empty path would be the current folder: `data=$PICTURES` without the variable reads other pictures."""
    with pytest.raises(AntherError, match=f"^{key}: must not be empty"):
        compose([f"{key}="], tmp_path / "none")


def test_plans_read_the_same():
    assert OmegaConf.to_container(parse_override("base=1e3", PlanConfig), resolve=True) == {"base": "1e3"}
