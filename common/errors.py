"""The exception with messages for users, and one-line messages for errors of the operating system and of libraries."""

from __future__ import annotations

import errno
import os
import sqlite3

LONGEST = 160
"""Maximum number of characters of a name in a message."""


class AntherError(Exception):
    """Bad input, with a one-line message that states the problem and the remedy.

    Raised for problems that a user can fix (configuration, data, a checkpoint, a message from a device). Applications
    print it without a traceback and exit with a nonzero code. The message is one line whatever it quotes: characters
    that a terminal would interpret are escaped.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    r"""Replace line breaks by spaces and escape other unprintable characters, e.g. as `\x1b`."""
    if text.isprintable():
        return text
    parts = (
        c if c.isprintable() else " " if c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text.replace("\r\n", "\n")
    )
    return "".join(parts)


def shorten(name: object, longest: int = LONGEST) -> str:
    """Return an untrusted name in one line of at most `longest` characters."""
    text = one_line(str(name))
    return text if len(text) <= longest else f"{text[: longest - 20]} … {text[-15:]}"


def summary(error: BaseException, longest: int = 200) -> str:
    """Return the message of a library's error in one line of at most `longest` characters."""
    return " ".join(str(error).split())[:longest]


def os_error(error: OSError, path: object = None) -> AntherError:
    """Convert an error of the operating system to an AntherError with a remedy.

    Args:
        error: the error.
        path: its subject, if the error doesn't contain a file name.
    """
    name = error.filename if error.filename is not None else path
    where = "" if name is None else f"{shorten(os.fsdecode(name) if isinstance(name, bytes) else name)}: "
    if error.errno in (errno.EACCES, errno.EPERM):
        return AntherError(
            f"{where}no permission for user {_user()}: grant it access (chmod, chown), or use another user"
        )
    if error.errno in _REMEDIES:
        return AntherError(where + _REMEDIES[error.errno])
    return AntherError(f"{where}{error.strerror or type(error).__name__}: name another file or folder")


REPORTED_ERRORS: tuple[type[Exception], ...] = (AntherError, OSError, sqlite3.OperationalError)
"""Errors that commands report by one line, `describe_error`, without a traceback."""


def describe_error(error: Exception) -> str:
    """Return one line for an error of `REPORTED_ERRORS`."""
    if isinstance(error, AntherError):
        return str(error)
    if isinstance(error, OSError):
        return str(os_error(error))
    return str(AntherError(f"a database can't be used ({error}): check its disk's free space and its folder's owner"))


def _user() -> str:
    """Return the name of this process's user, or its number if it has no name."""
    try:
        import pwd

        return pwd.getpwuid(os.geteuid()).pw_name
    except (ImportError, KeyError):
        return str(os.geteuid()) if hasattr(os, "geteuid") else "this user"


_REMEDIES = {
    errno.ENOSPC: "no space left on the disk: make room, or name a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: make room, or name a folder on another disk",
    errno.EROFS: "lies on a read-only file system: name a folder that can be written to",
    errno.ENAMETOOLONG: "too long for a file's name: name another one",
    errno.ENOTDIR: "a file is in the way of a folder: move it, or name another folder",
    errno.EEXIST: "exists already: move it, or name another folder",
    errno.EISDIR: "is a folder, not a file: name a file",
    errno.ELOOP: "a symbolic link that leads to itself: correct the link",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.EIO: "the disk reports an input/output error: check it, or name another one",
}
