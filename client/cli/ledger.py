"""What this device has shared, and what that costs of its owner's privacy:  anther device ledger [--json]

`reset --forget` sets the ledger aside and begins a new one, for when it was lost or damaged and there is no backup; and
all that is encrypted with it, if that can't be read any more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from client.cli.paths import owner_parser, run
from client.store import keyring, layout, migrate
from client.store.open import check_store_exists, inspect_store
from common import file_lock
from common.errors import AntherError
from privacy import policy
from privacy.accounting import Guarantee, PoissonGaussian, with_strict
from privacy.encrypted_storage import HEADER_FILE, EncryptionHeader
from privacy.ledger.ledger import (
    JOURNAL,
    MARKER,
    OUTBOX,
    RESERVED,
    SEALED,
    SENT,
    TRAIN,
    DeviceLedger,
    LedgerHistory,
    Reservation,
)
from privacy.policy import Policy
from privacy.storage import FileStorage

WIDTH = 130

FRESH = "nothing was ever shared from here: there is no ledger"
FORGOTTEN = """The old ledger is now in {aside}.
From here on ε is counted from 0 again, though what was shared stays shared: of pictures that were trained on before, it
is what both ledgers count together. A run whose server knew the old ledger refuses to be forgotten: this device takes
part again with the next run."""

SEALED_UP = (*layout.ROUND_FILES, *layout.ADAPTERS, layout.SEED, layout.CACHE, layout.FEDERATIONS, HEADER_FILE)
"""What goes with a ledger whose key is gone: nobody can read it either."""

STATES = {RESERVED: "charged", SEALED: "reply sealed", SENT: "reply received"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 2, with one line on standard error, if the ledger can't be believed."""
    parser = owner_parser("client.cli.ledger", __doc__ or "")
    parser.add_argument("command", nargs="?", choices=("show", "reset"), default="show")
    parser.add_argument("--json", action="store_true", help="show it as JSON")
    parser.add_argument("--forget", action="store_true", help="with reset: yes, count ε from 0 again")
    return run(parser, arguments, _act)


def _act(files: FileStorage, asked: argparse.Namespace) -> str:
    if asked.command == "reset":
        return reset(files, sure=asked.forget)
    if (asked.store or asked.name) and not (files.heads / JOURNAL).exists():
        check_store_exists(files)  # a mistyped folder is no device that has shared nothing
    return show(files, as_json=asked.json)


def show(files: FileStorage, *, as_json: bool = False) -> str:
    """The ledger in words, or as JSON. AntherError if chain or anchors don't hold."""
    known = [files.folder / JOURNAL, files.folder / MARKER, files.heads / JOURNAL]
    ledger = DeviceLedger(inspect_store(files).storage)
    history = ledger.history() if any(path.exists() for path in known) else LedgerHistory()
    owners = policy.load(files.folder / "policy.toml")
    if as_json:
        return json.dumps(as_plain(history, owners), indent=2)
    return in_words(history, owners, files) if history.entries else FRESH


def reset(files: FileStorage, *, sure: bool) -> str:
    """Set the ledger aside; what that means. AntherError unless its owner is sure."""
    if not sure:
        raise AntherError(
            "reset forgets what this device has promised: ε is counted from 0 again; say `reset --forget` if that is "
            "meant, or restore the ledger from a backup"
        )
    if not files.folder.is_dir() and not (files.heads / JOURNAL).exists():
        return FRESH
    migrate.version(files)  # of a newer one nobody knows here what goes with a ledger
    beside = layout.left(files.folder) if _readable(files) else SEALED_UP
    with file_lock.exclusive(files.folder, what="the store"):
        aside = files.set_aside(JOURNAL, OUTBOX, MARKER, *beside)
    return FRESH if aside is None else FORGOTTEN.format(aside=aside)


def _readable(files: FileStorage) -> bool:
    """Whether what is encrypted there can be read with the key that there is."""
    if (data := files.read(HEADER_FILE)) is None:
        return migrate.in_the_open(files)
    if (key := keyring.find()) is None:
        return False
    try:
        EncryptionHeader.read(data, files.where(HEADER_FILE)).check(key, files.where(HEADER_FILE))
    except AntherError:
        return False
    return True


def as_plain(history: LedgerHistory, owners: Policy) -> dict[str, Any]:
    """All of it as plain values; ε is null where none can be promised."""
    spent = _spent(history, owners)
    return {
        "ledger": history.ledger,
        "events": history.events,
        "epsilon": dataclasses.asdict(spent) | {name: _finite(getattr(spent, name)) for name in ("value", "strict")},
        "max_epsilon": owners.max_epsilon,
        "entries": [
            {
                "state": entry.state,
                **dict(zip(STATES, entry.at, strict=False)),  # when
                **{name: value for name, value in _fields(entry.reservation).items() if name != "mechanism"},
                "mechanism": vars(mechanism) if isinstance(mechanism, PoissonGaussian) else None,
                "sha256": entry.sha256,
            }
            for entry in history.entries.values()
            for mechanism in [entry.reservation.mechanism]
        ],
    }


def in_words(history: LedgerHistory, owners: Policy, files: FileStorage) -> str:
    """A table of what was shared with each run, and what it all comes to."""
    from rich.console import Console, Group  # slow imports, so only here
    from rich.table import Table

    tables: dict[str, Table] = {}
    for entry in history.entries.values():
        made = entry.reservation
        if made.run not in tables:
            tables[made.run] = Table(title=f"shared with run {made.run}", title_justify="left")
            for heading in ("round", "what", "noise", *STATES.values(), "release"):
                tables[made.run].add_column(heading, justify="right" if heading == "round" else "left")
        when = [at[:16].replace("T", " ") for at in entry.at]  # 2031-05-06 07:08, in UTC as it was noted
        tables[made.run].add_row(
            str(made.round),
            "an adapter" if made.purpose == TRAIN else "how the adapter does",
            _noise(made),
            *when,
            *["–"] * (len(STATES) - len(when)),
            "yes" if made.release else "no: test",
        )
    known = f"Ledger {str(history.ledger)[:8]} of {files.folder}, {history.events} events; times are UTC."
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with console.capture() as captured:
        console.print(Group(*tables.values(), *_promise(history, owners), known), highlight=False)
    return captured.get().rstrip("\n")


def _promise(history: LedgerHistory, owners: Policy) -> list[str]:
    """What everything together promises, and how much of the cap is left."""
    spent, entries = _spent(history, owners), history.entries.values()
    lines = []
    if spent.value == math.inf:
        bare = sum(_is_bare(entry.reservation) for entry in entries)
        lines.append(f"Shared without noise: {bare} of {len(entries)}, so no ε can be promised.")
        lines.append("What is shared without noise isn't sealed and has no dates of a reply: count it as sent.")
    else:
        lines.append(f"All of it together: {spent}. It bounds what anybody can learn of any one picture.")
        if owners.max_epsilon is None:
            lines.append("policy.toml sets no max_epsilon: nothing ends this.")
        else:
            left = max(0.0, owners.max_epsilon - spent.value)
            lines.append(f"policy.toml allows ε={owners.max_epsilon:g} at this δ: {left:.3g} is left.")
    if simulated := sum(not entry.reservation.release for entry in entries):
        lines.append(f"Made with a test's reproducible noise, not a release: {simulated} of {len(entries)}.")
    if waiting := sum(entry.state == RESERVED and not _is_bare(entry.reservation) for entry in entries):
        lines.append(f"Charged, with no sealed reply yet: {waiting}. What was charged stays charged.")
    if sum(entry.state == SEALED for entry in entries):
        lines.append(
            "A reply without a date under “received” was sent: a server tells that it came by asking for a later round."
        )
    if (sets := len({entry.reservation.data for entry in entries})) > 1:
        lines.append(f"The pictures changed in between: there were {sets} sets; ε bounds what was shared of each one.")
    return lines


def _spent(history: LedgerHistory, owners: Policy) -> Guarantee:
    return with_strict(history.spent(owners.delta), history.mechanisms)


def _finite(epsilon: float | None) -> float | None:
    return None if epsilon is None or math.isinf(epsilon) else epsilon


def _noise(made: Reservation) -> str:
    match made.mechanism:
        case PoissonGaussian(noise_multiplier=sigma, sampling_rate=q, steps=steps):
            each = f"σ={sigma:.3g} C={made.clip:g}"
            return f"{each} q={q:.3g}, {steps} steps" if made.purpose == TRAIN else each
        case _:
            return "none"


def _is_bare(made: Reservation) -> bool:
    """Whether it is shared without noise, and so without a seal."""
    return not isinstance(made.mechanism, PoissonGaussian)


def _fields(made: Reservation) -> dict[str, Any]:
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}


if __name__ == "__main__":
    sys.exit(main())
