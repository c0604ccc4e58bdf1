"""Output on terminals with limited encodings, and one-line error messages."""

from __future__ import annotations

import errno
import io
import sqlite3

import pytest

from common.errors import AntherError, describe_error, one_line, os_error, shorten
from common.terminal import use_plain_output


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", "about 3 s left ... eps = 8 +/- 1 ## Gr\\xf6\\xdfe"),
        ("latin-1", "about 3 s left ... eps = 8 ± 1 ## Größe"),
        ("utf-8", "about 3 s left … ε = 8 ± 1 ██ Größe"),
    ],
)
def test_output_in_any_encoding(encoding: str, printed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    use_plain_output()
    print("about 3 s left … ε = 8 ± 1 ██ Größe", flush=True)
    assert written.getvalue().decode(encoding).strip() == printed


def test_errors_are_one_line() -> None:
    assert str(AntherError("a\nb\x1b[2J\ud83dc")) == "a b\\x1b[2J\\ud83dc"
    assert one_line("Größe 写真 x") == "Größe 写真 x"
    assert len(shorten("x" * 1000)) < 200


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "no permission"),
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "in the way"),
        (errno.EEXIST, "exists already"),
        (errno.ENOENT, "No such file"),
    ],
)
def test_system_errors_name_the_file(number: int, words: str) -> None:
    import os

    line = str(os_error(OSError(number, os.strerror(number), "/some/place")))
    assert line.startswith("/some/place: ")
    assert words in line


def test_database_errors_are_one_line() -> None:
    line = describe_error(sqlite3.OperationalError("database or disk is full"))
    assert line == (
        "a database can't be used (database or disk is full): check its disk's free space and its folder's owner"
    )
