"""Find the device's encryption key, which is stored outside of the data that it encrypts.

    $CREDENTIALS_DIRECTORY/anther-key    a systemd credential, which the TPM or the host's own key can encrypt:
                                         systemd-creds encrypt --name=anther-key KEY /etc/credstore.encrypted/anther-key
                                         and LoadCredentialEncrypted=anther-key in the unit
    $ANTHER_KEY_FILE                     a file that only its owner can read, best on another disk:
                                         (umask 077; head -c 32 /dev/urandom > KEY)

A key is 32 bytes, or 64 hex digits. Other key stores are not supported, each for a reason. The kernel's keyring is
empty after every reboot, so the key would have to be stored elsewhere anyway. The Secret Service needs a desktop
session and a D-Bus library. Android's keystore, as `termux-keystore` exposes it, signs but does not encrypt; an app's
own files are encrypted by Android itself.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from common.errors import AntherError

CREDENTIALS, CREDENTIAL, FILE = "CREDENTIALS_DIRECTORY", "anther-key", "ANTHER_KEY_FILE"
KEY_BYTES = 32

NO_KEY = (
    f"no key is set: pass it as systemd's credential {CREDENTIAL}, or set {FILE} to its file (python -m pydoc "
    "client.store.keyring)"
)


def find_key(environ: Mapping[str, str] = os.environ) -> bytes | None:
    """Return the key from the first source that has one; None if there is none.

    Raises:
        AntherError: a source has an unusable key; another source is never used instead.
    """
    if folder := environ.get(CREDENTIALS):
        file = Path(folder) / CREDENTIAL
        if file.exists():
            return _parsed(_read(file)[0], file)  # systemd restricts access, by rules that the mode doesn't show
    if named := environ.get(FILE):
        file = Path(named).expanduser()
        data, status = _read(file)
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_uid not in (os.getuid(), 0):
            raise AntherError(f"{FILE}={file}: must be your own file, readable only by you: chmod 600 {file}")
        return _parsed(data, file)
    return None


def _read(file: Path) -> tuple[bytes, os.stat_result]:
    """Read the key file: its first 1024 bytes, and its status."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
        try:
            return os.read(handle, 1024), os.fstat(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise AntherError(f"{file}: the key can't be read ({error.strerror}): make it readable") from error


def _parsed(data: bytes, file: Path) -> bytes:
    if len(data) == KEY_BYTES:
        return data
    try:
        key = bytes.fromhex(data.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise AntherError(
            f"{file}: must be {KEY_BYTES} bytes or {2 * KEY_BYTES} hex digits: head -c {KEY_BYTES} /dev/urandom > KEY"
        )
    return key
