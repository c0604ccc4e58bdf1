"""How what a device keeps is laid out in its folder, and what of it belongs to one federation.

    version, lock             `client.store.migrate`, `common.file_lock`
    sealed                    `privacy.encrypted_storage`, if the store is encrypted
    policy.toml               what the owner allows, written by hand
    ledger.jsonl, outbox/, enrolled, seed, cache/       of the device, in whichever federation it is
    federation                the id of the one that it was in last
    federations/<id>/         of that one: its adapters, what its rounds left, previews

The ledger is the device's: it counts what was shared of the pictures, whoever got it, and a second one would count
from 0. What belongs to no federation that has an id lies beside it, as if `federations/<id>/` were the folder: what a
simulated device keeps, and what was there before federations had any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import AntherError
from privacy.ledger.ledger import JOURNAL, MARKER, OUTBOX
from privacy.storage import ASIDE

PERSONAL, SEED = "personal.safetensors", "seed"
PREVIOUS = ("previous.safetensors", *(f"previous-{number}.safetensors" for number in range(2, 7)))
"""The first is of before there were several."""
RESIDUAL, VARIATE, LOCAL_FACTORS = "residual.safetensors", "variate.safetensors", "own.safetensors"
PREVIEWS, CACHE = "previews", "cache"
VERSION, FEDERATION, FEDERATIONS = "version", "federation", "federations"

ADAPTERS = (PERSONAL, *PREVIOUS)
ROUND_FILES = (RESIDUAL, VARIATE, LOCAL_FACTORS)  # of rounds: it goes with the ledger that counted them
FEDERATION_FILES = (*ADAPTERS, *ROUND_FILES, PREVIEWS)

_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}")  # of `common.atomic_files.write`


def federation_prefix(federation: str | None) -> str:
    """What goes before the names of what belongs to a federation; None: to none that has an id.

    Raises AntherError for an id that is no plain name.
    """
    if federation is None:
        return ""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", federation):
        raise AntherError(f"federation {federation[:100]!r}: must be of a-z, 0-9, '.', '_' and '-'; enrol again")
    return f"{FEDERATIONS}/{federation}/"


def federations(folder: Path) -> list[str | None]:
    """Ids of the federations that something is kept of; None is first if that is of one without."""
    named = sorted(path.name for path in folder.glob(f"{FEDERATIONS}/*/") if not path.name.startswith("."))
    return [None, *named] if any((folder / name).exists() for name in FEDERATION_FILES) else [*named]


def left(folder: Path) -> list[str]:
    """Names of what rounds have left, of all federations."""
    return [
        f"{federation_prefix(federation)}{name}"
        for federation in dict.fromkeys((None, *federations(folder)))
        for name in ROUND_FILES
    ]


def private(folder: Path) -> Iterator[str]:
    """Names of the files there that hold what is the owner's alone, but for pictures to look at.

    Nothing that this code didn't write is among them.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and is_private(name):
            yield name


def is_private(name: str) -> bool:
    """Whether a file of this name is one of those; one that was set aside is as it was."""
    _, rest = split(name)
    if rest.startswith((f"{OUTBOX}/", f"{CACHE}/")):
        return not Path(rest).name.startswith(".")
    return rest in (*ADAPTERS, *ROUND_FILES, SEED, JOURNAL)


def is_plaintext(name: str) -> bool:
    """Whether a blob of this name is none of those."""
    return name in (MARKER, VERSION, FEDERATION) or Path(name).parent.name == PREVIEWS


def original(name: str) -> str:
    """What a file was called before it was set aside."""
    return re.sub(rf"^{ASIDE}-\d+/", "", name)


def split(name: str) -> tuple[str | None, str]:
    """Whose a file is, and what it is called there."""
    rest = original(name)
    found = re.match(rf"{FEDERATIONS}/([^/.][^/]*)/", rest)
    return (found[1], rest[found.end() :]) if found else (None, rest)


def unfinished(folder: Path) -> list[Path]:
    """What writes that were killed have left, which nobody will read."""
    return [path for path in folder.rglob(".*") if _UNFINISHED.fullmatch(path.name) and path.is_file()]
