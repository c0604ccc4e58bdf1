"""Show everything that this device has shared, and the privacy cost:  anther device ledger [--json]

The privacy cost ε (epsilon) limits how much anyone can learn about any one of your pictures: smaller is more private.
`reset --forget` sets the ledger aside and starts a new one, in case it was lost or damaged and there is no backup. Data
that was encrypted with it and can't be read any more is set aside too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from client.cli.common import owner_parser, read_history, run
from client.store import keyring, layout, migrate
from client.store.open import check_store_exists
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
    LedgerHistory,
    Reservation,
)
from privacy.policy import Policy
from privacy.storage import FileStorage

WIDTH = 130

FRESH = "nothing has been shared from here: there is no ledger"
FORGOTTEN = """The old ledger is now in {aside}.
ε is counted from 0 again, but earlier releases can't be undone: for pictures that were used before, the privacy cost is
the sum of both ledgers. A run whose server knew the old ledger doesn't accept this device any more. The device takes
part again in the next run."""

SEALED_UP = (*layout.ROUND_FILES, *layout.ADAPTERS, layout.SEED, layout.CACHE, layout.FEDERATIONS, HEADER_FILE)
"""Files that are set aside with a ledger if its encryption key is lost, because they can't be read either."""

STATES = {RESERVED: "charged", SEALED: "reply sealed", SENT: "reply received"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2, with one line on standard error, if the ledger is damaged."""
    parser = owner_parser("ledger", __doc__ or "")
    parser.add_argument("command", nargs="?", choices=("show", "reset"), default="show")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--forget", action="store_true", help="with reset: confirm that ε is counted from 0 again")
    return run(parser, arguments, _run_command)


def _run_command(files: FileStorage, options: argparse.Namespace) -> str:
    if options.command == "reset":
        return reset(files, confirmed=options.forget)
    if (options.store or options.name) and not (files.heads / JOURNAL).exists():
        check_store_exists(files)  # a mistyped folder must not look like a device that has shared nothing
    return show(files, as_json=options.json)


def show(files: FileStorage, *, as_json: bool = False) -> str:
    """Return the ledger as text or as JSON. AntherError if the hash chain or its anchors are broken."""
    history = read_history(files)
    owner_policy = policy.load(files.folder / "policy.toml")
    if as_json:
        return json.dumps(as_plain(history, owner_policy), indent=2)
    return as_text(history, owner_policy, files) if history.entries else FRESH


def reset(files: FileStorage, *, confirmed: bool) -> str:
    """Set the ledger aside; return a text that explains the effect. AntherError without `confirmed`."""
    if not confirmed:
        raise AntherError(
            "reset discards the record of everything shared so far: ε is counted from 0 again. Confirm with "
            "`reset --forget`, or restore the ledger from a backup"
        )
    if not files.folder.is_dir() and not (files.heads / JOURNAL).exists():
        return FRESH
    migrate.version(files)  # a newer version may store more files that belong to the ledger
    related = layout.round_files(files.folder) if _readable(files) else SEALED_UP
    with file_lock.exclusive(files.folder, what="the store"):
        aside = files.set_aside(JOURNAL, OUTBOX, MARKER, *related)
    return FRESH if aside is None else FORGOTTEN.format(aside=aside)


def _readable(files: FileStorage) -> bool:
    """Return whether encrypted files can be read with the available key."""
    if (data := files.read(HEADER_FILE)) is None:
        return migrate.is_unencrypted(files)
    if (key := keyring.find_key()) is None:
        return False
    try:
        EncryptionHeader.read(data, files.where(HEADER_FILE)).check(key, files.where(HEADER_FILE))
    except AntherError:
        return False
    return True


def as_plain(history: LedgerHistory, owner_policy: Policy) -> dict[str, Any]:
    """Return everything as plain values; ε is null if it is infinite."""
    spent = _total_guarantee(history, owner_policy)
    return {
        "ledger": history.ledger,
        "events": history.events,
        "epsilon": dataclasses.asdict(spent) | {name: _finite(getattr(spent, name)) for name in ("value", "strict")},
        "max_epsilon": owner_policy.max_epsilon,
        "entries": [
            {
                "state": entry.state,
                **dict(zip(STATES, entry.at, strict=False)),  # dates
                **{name: value for name, value in _fields(entry.reservation).items() if name != "mechanism"},
                "mechanism": vars(mechanism) if isinstance(mechanism, PoissonGaussian) else None,
                "sha256": entry.sha256,
            }
            for entry in history.entries.values()
            for mechanism in [entry.reservation.mechanism]
        ],
    }


def as_text(history: LedgerHistory, owner_policy: Policy, files: FileStorage) -> str:
    """Return a table of everything shared with each run, and its total privacy cost.

    Args:
        history: the ledger's content.
        owner_policy: the owner's policy.
        files: the device's files.
    """
    from rich.console import Console, Group  # slow imports, so only here
    from rich.table import Table

    tables: dict[str, Table] = {}
    for entry in history.entries.values():
        reservation = entry.reservation
        if reservation.run not in tables:
            tables[reservation.run] = Table(title=f"shared with run {reservation.run}", title_justify="left")
            for heading in ("round", "what", "noise", *STATES.values(), "release"):
                tables[reservation.run].add_column(heading, justify="right" if heading == "round" else "left")
        dates = [at[:16].replace("T", " ") for at in entry.at]  # 2031-05-06 07:08, in UTC as recorded
        tables[reservation.run].add_row(
            str(reservation.round),
            "adapter update" if reservation.purpose == TRAIN else "evaluation",
            _noise(reservation),
            *dates,
            *["–"] * (len(STATES) - len(dates)),
            "yes" if reservation.release else "no: test",
        )
    footer = f"Ledger {str(history.ledger)[:8]} of {files.folder}, {history.events} events; times are UTC."
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with console.capture() as captured:
        console.print(Group(*tables.values(), *_guarantee_lines(history, owner_policy), footer), highlight=False)
    return captured.get().rstrip("\n")


def _guarantee_lines(history: LedgerHistory, owner_policy: Policy) -> list[str]:
    """Return the lines about the total guarantee and the remaining budget."""
    spent, entries = _total_guarantee(history, owner_policy), history.entries.values()
    lines = []
    if spent.value == math.inf:
        without_noise = sum(_has_no_noise(entry.reservation) for entry in entries)
        lines.append(
            f"Shared without noise: {without_noise} of {len(entries)}, so there is no privacy guarantee (no finite ε)."
        )
        lines.append("Replies without noise have no dates: assume that they were sent.")
    else:
        lines.append(
            f"Total: {spent}. This limits how much anyone can learn about any one picture; smaller is more private."
        )
        if owner_policy.max_epsilon is None:
            lines.append("policy.toml sets no max_epsilon: there is no upper limit.")
        else:
            remaining = max(0.0, owner_policy.max_epsilon - spent.value)
            lines.append(f"policy.toml allows ε={owner_policy.max_epsilon:g} at this δ: {remaining:.3g} remains.")
    if simulated := sum(not entry.reservation.release for entry in entries):
        lines.append(f"Made with reproducible test noise, which protects nothing: {simulated} of {len(entries)}.")
    if waiting := sum(entry.state == RESERVED and not _has_no_noise(entry.reservation) for entry in entries):
        lines.append(f"Charged, but without a reply yet: {waiting}. They stay charged.")
    if sum(entry.state == SEALED for entry in entries):
        lines.append(
            "A reply without a date under “received” was sent. The server confirms a reply by requesting a later round."
        )
    if (sets := len({entry.reservation.data for entry in entries})) > 1:
        lines.append(f"The pictures changed in between: there were {sets} sets. ε holds for every picture of each set.")
    return lines


def _total_guarantee(history: LedgerHistory, owner_policy: Policy) -> Guarantee:
    return with_strict(history.spent(owner_policy.delta), history.mechanisms)


def _finite(epsilon: float | None) -> float | None:
    return None if epsilon is None or math.isinf(epsilon) else epsilon


def _noise(reservation: Reservation) -> str:
    match reservation.mechanism:
        case PoissonGaussian(noise_multiplier=sigma, sampling_rate=q, steps=steps):
            each = f"σ={sigma:.3g} C={reservation.clip:g}"
            return f"{each} q={q:.3g}, {steps} steps" if reservation.purpose == TRAIN else each
        case _:
            return "none"


def _has_no_noise(reservation: Reservation) -> bool:
    """Return whether an entry was shared without noise; such entries have no seal."""
    return not isinstance(reservation.mechanism, PoissonGaussian)


def _fields(reservation: Reservation) -> dict[str, Any]:
    return {field.name: getattr(reservation, field.name) for field in dataclasses.fields(reservation)}


if __name__ == "__main__":
    sys.exit(main())
