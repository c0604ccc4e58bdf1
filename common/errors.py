"""The one exception that a person is meant to read, and what the operating system refuses as such."""

from __future__ import annotations

import errno
import os
import sqlite3

LONGEST = 160
"""Characters of a name that one message shows."""


class AntherError(Exception):
    """Bad input: one line that names what is wrong and how to mend it.

    Every part raises it for what a user can mend (configuration, data, a checkpoint, a message from a device);
    applications print it without a traceback and exit with a code other than 0. The text is one line whatever it
    quotes: characters that a terminal would act on are escaped.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    r"""`text` with line breaks as spaces and every other character that can't be printed escaped, as `\x1b`."""
    if text.isprintable():
        return text
    parts = (
        c if c.isprintable() else " " if c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text.replace("\r\n", "\n")
    )
    return "".join(parts)


def shown(name: object, longest: int = LONGEST) -> str:
    """A name that somebody else chose, in one line and not longer than `longest` characters."""
    text = one_line(str(name))
    return text if len(text) <= longest else f"{text[: longest - 20]} … {text[-15:]}"


def summary(error: BaseException, longest: int = 200) -> str:
    """The message of a library's error in one line, cut to `longest` characters."""
    return " ".join(str(error).split())[:longest]


def refused(error: OSError, path: object = None) -> AntherError:
    """What the operating system refused, in one line.

    Args:
        error: as it was raised.
        path: what it was about, where the error doesn't say.
    """
    name = error.filename if error.filename is not None else path
    where = "" if name is None else f"{shown(os.fsdecode(name) if isinstance(name, bytes) else name)}: "
    if error.errno in (errno.EACCES, errno.EPERM):
        return AntherError(f"{where}no permission for user {_user()}: let that user in (chmod, chown), or use another")
    if error.errno in _MENDS:
        return AntherError(where + _MENDS[error.errno])
    return AntherError(f"{where}{error.strerror or type(error).__name__}: name another file or folder")


REPORTED_ERRORS: tuple[type[Exception], ...] = (AntherError, OSError, sqlite3.OperationalError)
"""What a command ends with one line for, `told`, and no traceback."""


def told(error: Exception) -> str:
    """One line for an error of `REPORTED_ERRORS`."""
    if isinstance(error, AntherError):
        return str(error)
    if isinstance(error, OSError):
        return str(refused(error))
    return str(AntherError(f"a database can't be used ({error}): is its disk full, or its folder not yours?"))


def _user() -> str:
    """Who this process is; a user that has no name is a number."""
    try:
        import pwd

        return pwd.getpwuid(os.geteuid()).pw_name
    except (ImportError, KeyError):
        return str(os.geteuid()) if hasattr(os, "geteuid") else "this user"


_MENDS = {
    errno.ENOSPC: "no space left on the disk: make room, or name a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: make room, or name a folder on another disk",
    errno.EROFS: "lies on a read-only file system: name a folder that can be written to",
    errno.ENAMETOOLONG: "too long for a file's name: name another one",
    errno.ENOTDIR: "a file is in the way of a folder: move it, or name another folder",
    errno.EEXIST: "something is in the way there: move it, or name another folder",
    errno.EISDIR: "is a folder, not a file: name a file",
    errno.ELOOP: "a symbolic link that leads to itself: mend it",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.EIO: "the disk reports an input/output error: check it, or name another one",
}
