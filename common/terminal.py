"""Output on terminals with limited encodings: characters that can't be encoded are replaced by ASCII."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Mapping

PLAIN: Mapping[str, str] = {
    "…": "...",
    "–": "-",
    "—": "-",
    "·": "|",
    "×": "x",
    "±": "+/-",
    "≤": "<=",
    "≥": ">=",
    "→": "->",
    "°": " deg ",
    "ε": "eps",
    "δ": "delta",
    "σ": "sigma",
    "μ": "mu",
    "η": "eta",
    "β": "beta",
    "α": "alpha",
    "τ": "tau",
    "█": "#",
    "▉": "#",
    "▊": "#",
    "▋": "#",
    "▌": "#",
    "▍": "-",
    "▎": "-",
    "▏": "-",
    "░": ".",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "\u00a0": " ",
    "\u202f": " ",
}
_HANDLER = "anther.plain"


def plain(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks; an error handler for `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    escaped = (PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing)
    return "".join(escaped), error.end


def use_plain_output() -> None:
    """Make standard output and standard error write characters that they can't encode as ASCII."""
    codecs.register_error(_HANDLER, plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # tests and notebooks replace the streams
            stream.reconfigure(errors=_HANDLER)


def discard_output() -> None:
    """Discard further standard output, because its reader has closed the pipe, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
