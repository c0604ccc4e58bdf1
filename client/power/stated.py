"""A JSON file in place of sensors: for tests, or for a gateway that measures in another way.

    {"charging": true, "battery": 0.8, "celsius": 41.5, "watts": 7.2}

Its keys are the fields of `Conditions`; a missing key or null means unknown. Replace the file atomically instead of
overwriting it: a partial file can't be read, and training waits until it can.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from client.power.conditions import ESTIMATE, MEASURED, Conditions
from common.errors import AntherError

COVERS = "as stated in the file power.file"

_FLAGS = {"charging", "throttled", "owner_active", "metered"}
_QUALITY = "watts_quality"
_KEYS = {field.name for field in dataclasses.fields(Conditions)}


def read_stated(file: Path) -> Conditions:
    """Read the current conditions from the file.

    Raises:
        AntherError: the file can't be read, or a value is impossible; the message names the file.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AntherError(f"power.file: {file} can't be read ({error})") from None
    if not isinstance(values, dict):
        raise AntherError(f"power.file: {file} is not a JSON object")
    for key, value in values.items():
        if reason := _problem(key, value):
            raise AntherError(f"power.file: {file}: {key}={value!r}: {reason}")
    return Conditions(**{key: value for key, value in values.items() if value is not None})


def _problem(key: str, value: object) -> str | None:
    """Return the reason why a value is invalid; None if it is valid."""
    if key not in _KEYS:
        return f"no such key; use one of {', '.join(sorted(_KEYS))}"
    if value is None:
        return None
    if key == _QUALITY:
        return None if value in (MEASURED, ESTIMATE) else f"must be {MEASURED} or {ESTIMATE}"
    if key in _FLAGS:
        return None if isinstance(value, bool) else "must be true, false or null"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "must be a number or null"
    if key == "battery" and not 0 <= value <= 1:
        return "must be 0 to 1, a fraction of a full battery"
    return "must be 0 or more" if key in ("free_mib", "watts") and value < 0 else None
