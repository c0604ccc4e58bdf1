"""Where a device's key is kept, if it is kept anywhere: outside of what it encrypts.

    $CREDENTIALS_DIRECTORY/anther-key    systemd's credentials, which the TPM or the host's own key can seal:
                                         systemd-creds encrypt --name=anther-key KEY /etc/credstore.encrypted/anther-key
                                         and LoadCredentialEncrypted=anther-key in the unit
    $ANTHER_KEY_FILE                     a file for its owner's eyes only, best on another disk:
                                         (umask 077; head -c 32 /dev/urandom > KEY)

A key is 32 bytes, or 64 hex digits. Other keepers are left out, each for its reason. The kernel's keyring forgets at
every reboot, so that something else would have to hold the key anyway. The Secret Service needs a desktop's session
and a D-Bus library. Android's keystore, as `termux-keystore` hands it out, signs and doesn't encrypt; what an app
keeps there is encrypted by Android itself.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from common.errors import AntherError

CREDENTIALS, CREDENTIAL, FILE = "CREDENTIALS_DIRECTORY", "anther-key", "ANTHER_KEY_FILE"
KEY = 32  # bytes

NONE = (
    f"there is no key: give it as systemd's credential {CREDENTIAL} or as a file by {FILE} (python -m pydoc "
    "client.store.keyring)"
)


def find(environ: Mapping[str, str] = os.environ) -> bytes | None:
    """The key from the first keeper that has one; None if none has.

    Raises:
        AntherError: there is one that can't be used: never another in its place.
    """
    if folder := environ.get(CREDENTIALS):
        file = Path(folder) / CREDENTIAL
        if file.exists():
            return _parsed(_read(file)[0], file)  # systemd sees to who may read it, by rules that its mode doesn't show
    if named := environ.get(FILE):
        file = Path(named).expanduser()
        data, found = _read(file)
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077 or found.st_uid not in (os.getuid(), 0):
            raise AntherError(f"{FILE}={file}: must be a file of yours that nobody else may read: chmod 600 {file}")
        return _parsed(data, file)
    return None


def _read(file: Path) -> tuple[bytes, os.stat_result]:
    """What it holds, and what it is."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
        try:
            return os.read(handle, 1024), os.fstat(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise AntherError(f"{file}: the key can't be read ({error.strerror})") from error


def _parsed(data: bytes, file: Path) -> bytes:
    if len(data) == KEY:
        return data
    try:
        found = bytes.fromhex(data.decode("ascii").strip())
    except ValueError:
        found = b""
    if len(found) != KEY:
        raise AntherError(f"{file}: must be {KEY} bytes or {2 * KEY} hex digits: head -c {KEY} /dev/urandom > KEY")
    return found
