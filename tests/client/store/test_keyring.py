"""Sources of the encryption key: a safe file or credential, complete or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from client.store import keyring
from common.errors import AntherError

KEY = bytes(range(32))


def write_key(file: Path, data: bytes, mode: int = 0o600) -> Path:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(data)
    file.chmod(mode)
    return file


def test_no_key() -> None:
    assert keyring.find_key({}) is None


def test_systemd_credential_comes_first(tmp_path: Path) -> None:
    write_key(tmp_path / "credentials" / "anther-key", KEY, 0o440)  # systemd's mode where it uses access control lists
    environ = {
        "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"),
        "ANTHER_KEY_FILE": str(write_key(tmp_path / "key", bytes(32))),
    }
    assert keyring.find_key(environ) == KEY
    (tmp_path / "credentials" / "anther-key").unlink()
    assert keyring.find_key(environ) == bytes(32)


@pytest.mark.parametrize("data", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"])
def test_key_file_of_owner(data: bytes, tmp_path: Path) -> None:
    assert keyring.find_key({"ANTHER_KEY_FILE": str(write_key(tmp_path / "key", data))}) == KEY


@pytest.mark.parametrize("data", [b"", b"short", bytes(31), bytes(33), b"x" * 64, KEY.hex().encode()[:-1], bytes(5000)])
def test_invalid_key(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="must be 32 bytes or 64 hex digits") as raised:
        keyring.find_key({"ANTHER_KEY_FILE": str(write_key(tmp_path / "key", data))})
    assert "\n" not in str(raised.value)


def test_file_readable_by_others_is_refused(tmp_path: Path) -> None:
    for mode in (0o644, 0o640, 0o604, 0o620):
        with pytest.raises(AntherError, match="chmod 600"):
            keyring.find_key({"ANTHER_KEY_FILE": str(write_key(tmp_path / "key", KEY, mode))})


def test_missing_key_file_is_an_error(tmp_path: Path) -> None:
    for named in (tmp_path / "gone", tmp_path):
        with pytest.raises(AntherError, match="the key can't be read"):
            keyring.find_key({"ANTHER_KEY_FILE": str(named)})


def test_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(AntherError):
        keyring.find_key({"ANTHER_KEY_FILE": str(tmp_path / "pipe")})
