"""Layout of a device's store, and the files that belong to one federation.

    version, lock             `client.store.migrate`, `common.file_lock`
    sealed                    `privacy.encrypted_storage`, if the store is encrypted
    policy.toml               the owner's policy, written by hand
    ledger.jsonl, outbox/, enrolled, seed, cache/       of the device, for all federations
    federation                id of the last federation
    federations/<id>/         files of that federation: adapters, round state, previews

The ledger belongs to the device: it counts everything that was shared about the pictures, with any federation, and a
second ledger would count from 0. Files of a federation without an id are in the store's own folder instead of
`federations/<id>/`: those of simulated devices, and those stored before federations had ids.
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
"""Files of previous adapters. The first name was chosen when only one was stored."""
RESIDUAL, VARIATE, LOCAL_FACTORS = "residual.safetensors", "variate.safetensors", "own.safetensors"
METHOD_STATE = "method.safetensors"
PREVIEWS, CACHE = "previews", "cache"
VERSION, FEDERATION, FEDERATIONS = "version", "federation", "federations"

ADAPTERS = (PERSONAL, *PREVIOUS)
ROUND_FILES = (RESIDUAL, VARIATE, LOCAL_FACTORS, METHOD_STATE)  # set aside with the ledger that counted the rounds
FEDERATION_FILES = (*ADAPTERS, *ROUND_FILES, PREVIEWS)

_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")  # temporary files of `common.atomic_files.write`


def federation_prefix(federation: str | None) -> str:
    """Return the path prefix of a federation's files; empty for None, no id.

    Raises AntherError if the id is not a plain name.
    """
    if federation is None:
        return ""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", federation):
        raise AntherError(f"federation {federation[:100]!r}: must consist of a-z, 0-9, '.', '_' and '-'; enroll again")
    return f"{FEDERATIONS}/{federation}/"


def federations(folder: Path) -> list[str | None]:
    """List the ids of federations with stored files; None comes first if there are files without a federation id."""
    named = sorted(path.name for path in folder.glob(f"{FEDERATIONS}/*/") if not path.name.startswith("."))
    return [None, *named] if any((folder / name).exists() for name in FEDERATION_FILES) else [*named]


def round_files(folder: Path) -> list[str]:
    """List the names of state files between rounds, of all federations."""
    return [
        f"{federation_prefix(federation)}{name}"
        for federation in dict.fromkeys((None, *federations(folder)))
        for name in ROUND_FILES
    ]


def private_files(folder: Path) -> Iterator[str]:
    """Yield the names of the owner's private files, previews excluded: those are for viewing.

    Only files that this code writes are included.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and is_private(name):
            yield name


def is_private(name: str) -> bool:
    """Return whether a file name is one of `private_files`; files set aside count under their original name."""
    _, original = split_name(name)
    if original.startswith((f"{OUTBOX}/", f"{CACHE}/")):
        return not Path(original).name.startswith(".")
    return original in (*ADAPTERS, *ROUND_FILES, SEED, JOURNAL)


def is_plaintext(name: str) -> bool:
    """Return whether a file of this name is stored unencrypted."""
    return name in (MARKER, VERSION, FEDERATION) or Path(name).parent.name == PREVIEWS


def original_name(name: str) -> str:
    """Return the name that a file had before it was set aside."""
    return re.sub(rf"^{ASIDE}-\d+/", "", name)


def split_name(name: str) -> tuple[str | None, str]:
    """Split a name into the federation's id, or None, and the name within its folder."""
    original = original_name(name)
    match = re.match(rf"{FEDERATIONS}/([^/.][^/]*)/", original)
    return (match[1], original[match.end() :]) if match else (None, original)


def temporary_files(folder: Path) -> list[Path]:
    """List the temporary files of writes that were killed; they are never read."""
    return [path for path in folder.rglob(".*") if _TEMPORARY.fullmatch(path.name) and path.is_file()]
