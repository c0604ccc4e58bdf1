"""The prose check finds each pattern in every kind of text, and the repository passes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import prose

PLANTED = [
    tuple(line.split("\t")) for line in Path(__file__).with_name("planted.txt").read_text(encoding="utf-8").splitlines()
]
KINDS = {
    "docstring.py": 'def f():\n    """{}"""\n',
    "comment.py": "x = 1  # {}\n",
    "message.py": 'raise ValueError("{}")\n',
    "page.md": "# Title\n\n{}\n",
    "group.yaml": "# {}\nkey: 1\n",
    "script.sh": "# {}\n",
}


def found(path: Path) -> set[str]:
    return {finding.pattern.name for finding in prose.check(path.name, prose.prose(path))}


@pytest.mark.parametrize(("pattern", "sentence"), PLANTED)
@pytest.mark.parametrize("kind", KINDS)
def test_planted_sentence_is_found(kind: str, pattern: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / kind
    file.write_text(KINDS[kind].format(sentence), encoding="utf-8")
    assert found(file) == {pattern}
    assert prose.main([str(file)]) == 1


def test_every_pattern_is_planted() -> None:
    assert {pattern for pattern, _ in PLANTED} == {pattern.name for pattern in prose.PATTERNS}


@pytest.mark.parametrize("name", ["test_nobody_is_asked", "test_so_many_are_drawn"])
def test_test_names_are_prose(name: str, tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(f"def {name}():\n    pass\n", encoding="utf-8")
    assert len(found(file)) == 1


def test_stored_strings_and_code_are_not_prose(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text('KIND = "train.personalise"\nalone = nobody = "grey"\n', encoding="utf-8")
    assert found(file) == set()
    page = tmp_path / "x.md"
    page.write_text("Run\n\n```bash\nanther draw 'X'\n```\nor `X`.\n".replace("X", "nobody"), encoding="utf-8")
    assert found(page) == set()


@pytest.mark.integration
def test_every_file_keeps_to_the_limits() -> None:
    files = prose.files()
    assert len(files) > 700
    assert [str(finding) for file in files for finding in prose.check(str(file), prose.prose(file))] == []


def test_limit_grows_with_the_length() -> None:
    filler = "word " * 4000
    assert prose.check("page.md", filler + " ".join(["It stands", "alone."])) == []
    assert len(prose.check("page.md", " ".join(["It stands", "alone."]))) == 1
    assert len(prose.check("page.md", filler + "It stands " + "alone. " * 3)) == 1
