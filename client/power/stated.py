"""A JSON file in place of sensors: for tests, and for a gateway that knows another way.

    {"charging": true, "battery": 0.8, "celsius": 41.5, "watts": 7.2}

Its keys are the fields of `Conditions`; null, or none at all: not known. It should be replaced, not written over: half
a file is no reading, and training waits until there is one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from client.power.conditions import ESTIMATE, MEASURED, Conditions
from common.errors import AntherError

COVERS = "what the file says of the device"

_FLAGS = {"charging", "throttled", "owner_active", "metered"}
_QUALITY = "watts_quality"
_KEYS = {field.name for field in dataclasses.fields(Conditions)}


def stated(file: Path) -> Conditions:
    """What the file says now.

    Raises:
        AntherError: it can't be read, or says what no sensor would; in one line that names it.
    """
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AntherError(f"power.file: {file} can't be read ({error})") from None
    if not isinstance(said, dict):
        raise AntherError(f"power.file: {file} is not a JSON object")
    for key, value in said.items():
        if wrong := _wrong(key, value):
            raise AntherError(f"power.file: {file}: {key}={value!r}: {wrong}")
    return Conditions(**{key: value for key, value in said.items() if value is not None})


def _wrong(key: str, value: object) -> str | None:
    """What is wrong with a value; None: nothing."""
    if key not in _KEYS:
        return f"there is no such key; name one of {', '.join(sorted(_KEYS))}"
    if value is None:
        return None
    if key == _QUALITY:
        return None if value in (MEASURED, ESTIMATE) else f"must be {MEASURED} or {ESTIMATE}"
    if key in _FLAGS:
        return None if isinstance(value, bool) else "must be true, false or null"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "must be a number or null"
    if key == "battery" and not 0 <= value <= 1:
        return "must be 0 to 1, a share of a full one"
    return "must be 0 or more" if key in ("free_mib", "watts") and value < 0 else None
