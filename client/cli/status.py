"""Show this device's current work and its history:  anther device status [--json]

Read from the files that the device keeps in ANTHER_HOME; nothing is sent, and a running device isn't disturbed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from client.cli.common import owner_parser, read_history, run
from client.paths import config_file, keys_folder
from client.store.open import inspect_store
from common import file_lock
from conf.schemas.node import NodeConfig, compose
from privacy import policy
from privacy.ledger.ledger import TRAIN
from privacy.storage import FileStorage

NOT_ENROLLED = "not enrolled: run anther device enroll with a ticket from the server's operator"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2, with one line on standard error, if the files can't be read."""
    parser = owner_parser("status", __doc__ or "")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    return run(parser, arguments, _show)


def _show(files: FileStorage, options: argparse.Namespace) -> str:
    status = read_status(files)
    return json.dumps(status, indent=2) if options.json else as_text(status)


def read_status(files: FileStorage) -> dict[str, Any]:
    """Return the device's state as plain values; ε is null if it is infinite."""
    node = compose([], config_file())
    history = read_history(files)
    sent = [entry.at[-1] for entry in history.entries.values()]
    owner_policy = policy.load(files.folder / "policy.toml")
    spent = history.spent(owner_policy.delta).value if history.entries else 0.0
    return {
        "address": node.connection.address,
        "federation": node.federation,
        "pictures": node.data,
        "store": str(files.folder),
        "activity": _activity(node, files),
        "process": file_lock.holder(keys_folder()),
        "updates": sum(entry.reservation.purpose == TRAIN for entry in history.entries.values()),
        "evaluations": sum(entry.reservation.purpose != TRAIN for entry in history.entries.values()),
        "runs": len({entry.reservation.run for entry in history.entries.values()}),
        "last_event": max(sent, default=None),
        "epsilon": None if math.isinf(spent) else spent,
        "delta": owner_policy.delta,
        "max_epsilon": owner_policy.max_epsilon,
        "personal_adapter": _personal_adapter(files),
    }


def as_text(status: dict[str, Any]) -> str:
    """Return the state as lines for the owner."""
    process = f" (process {status['process']})" if status["process"] else ""
    shared = ", ".join(f"{name}: {status[name]}" for name in ("updates", "evaluations", "runs"))
    last = f"; the last on {status['last_event'][:16].replace('T', ' ')} UTC" if status["last_event"] else ""
    epsilon = "none (something was shared without noise)" if status["epsilon"] is None else f"{status['epsilon']:.3g}"
    limit = "" if status["max_epsilon"] is None else f", of {status['max_epsilon']:g} allowed by policy.toml"
    lines = {
        "federation": f"{status['federation'] or 'without id'} at {status['address']}" if status["address"] else "none",
        "pictures": status["pictures"] or "no folder set",
        "store": status["store"],
        "activity": status["activity"] + process,
        "shared": shared + last,
        "privacy spent": f"ε = {epsilon} at δ = {status['delta']:g}{limit}",
        "personal adapter": status["personal_adapter"] or "none yet",
    }
    return "\n".join(f"{name:<17} {text}" for name, text in lines.items())


def _activity(node: NodeConfig, files: FileStorage) -> str:
    if node.connection.address is None:
        return NOT_ENROLLED
    if file_lock.holder(keys_folder()) is None:
        return "stopped: start it with anther device run"
    if file_lock.holder(files.folder) is None:
        return "waiting for the server"
    return "working: the base is in memory"


def _personal_adapter(files: FileStorage) -> str | None:
    """Return the creation date of the current personal adapter."""
    if not files.folder.is_dir():
        return None
    versions = inspect_store(files).store.personal_versions()
    return next((version.created for version in versions if version.is_current), None)


if __name__ == "__main__":
    sys.exit(main())
