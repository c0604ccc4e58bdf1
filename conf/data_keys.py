"""Refuse keys of one kind of data with another, where a person writes them: presets set some for both kinds."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import AntherError

_INSTEAD = {"data.writers": "set data.people, the number of people", "data.role": "set data.roles=[…]"}
"""Keys of the built-in writers, and what to set with data=people."""


def refuse_other_data(words: Sequence[str]) -> None:
    """Raise AntherError for a key of the built-in writers with data=people.

    Args:
        words: words of the command line.
    """
    values = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    people = values.get("data") == "people" or values.get("data.path", "null") != "null"
    for key in values.keys() & _INSTEAD if people else ():
        raise AntherError(f"{key}={values[key]}: only used by data=typefaces and data=folder; {_INSTEAD[key]}")
