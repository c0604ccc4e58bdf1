"""What this device has promised, kept on its own disk: reserved → sealed → sent.

Append-only JSON lines, fsynced one by one. A round is charged when it is reserved, before training, and never
refunded: a crash while reserved discards everything derived and trains again under the same reservation. Once the
reply is sealed, only those bytes are ever sent: a second, differently noised reply would be a second release.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conf.errors import AntherError
from privacy import durable
from privacy.accounting import (
    ADD_OR_REMOVE_ONE,
    IMAGE,
    Guarantee,
    Mechanism,
    NonPrivate,
    PoissonGaussian,
    epsilon,
)
from privacy.policy import Refusal

RESERVED, SEALED, SENT = "reserved", "sealed", "sent"
Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """What one round is charged for."""

    run: str
    round: int
    base: str
    """Content hash of the base."""
    plan: str
    """Fingerprint of the plan: one (run, round) is trained by one plan only."""
    mechanism: Mechanism
    clip: float | None
    """C, with a Gaussian mechanism."""
    release: bool
    """False for simulated noise, which is charged all the same."""
    unit: str = IMAGE
    relation: str = ADD_OR_REMOVE_ONE

    @property
    def key(self) -> Key:
        return self.run, self.round


@dataclass(frozen=True)
class Entry:
    """One reservation and how far it has come."""

    reservation: Reservation
    state: str = RESERVED
    sha256: str | None = None
    """Of the sealed reply."""


Entries = dict[Key, Entry]


class Ledger:
    """The ledger of one device in `folder`: `ledger.jsonl`, and sealed replies in `outbox/`.

    Every method reads the file again under a lock, so that processes on one device see each other's events.

    Raises:
        AntherError: the file is damaged other than by a torn last line.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._outbox = folder / "ledger.jsonl", folder / "outbox"

    def reserve(self, reservation: Reservation, admit: Callable[[Sequence[Mechanism], Mechanism], None]) -> None:
        """Charge for a round, unless it is charged for already.

        Args:
            admit: given the mechanisms so far and the new one, raises to refuse it; called under the lock, so that
                two processes can't both take the last of a budget, and before anything is written.

        Raises:
            Refusal: this (run, round) is reserved for another plan.
        """
        with self._opened() as (entries, append):
            if _same(entries, reservation) is None:
                admit(_mechanisms(entries), reservation.mechanism)
                append(_to_event(reservation))

    def seal(self, key: Key, reply: bytes) -> bytes:
        """Fix the reply to a reserved round; returns the bytes to send: an earlier seal's, if there is one."""
        with self._opened() as (entries, append):
            entry = entries[key]
            if entry.state == RESERVED:
                digest = hashlib.sha256(reply).hexdigest()
                durable.write(self._file(key), reply)
                append({"state": SEALED, "run": key[0], "round": key[1], "sha256": digest})
                return reply
            return self._read_sealed(entry)

    def sealed(self, reservation: Reservation) -> bytes | None:
        """The bytes to send (again) for this round; None if it is not sealed yet.

        Raises:
            Refusal: this (run, round) belongs to another plan, or its reply was removed as sent.
            AntherError: the sealed reply is damaged.
        """
        with self._opened() as (entries, _):
            entry = _same(entries, reservation)
            return None if entry is None or entry.state == RESERVED else self._read_sealed(entry)

    def sent(self, key: Key) -> None:
        """Note that the server has moved past a sealed reply: it is not asked for again, and its bytes are removed."""
        with self._opened() as (entries, append):
            if entries[key].state == SEALED:
                append({"state": SENT, "run": key[0], "round": key[1]})
                self._file(key).unlink(missing_ok=True)

    def entries(self) -> tuple[Entry, ...]:
        """Every reservation in the order made."""
        with self._opened() as (entries, _):
            return tuple(entries.values())

    def spent(self, delta: float) -> Guarantee:
        """ε of everything reserved so far, whether or not it was sent."""
        with self._opened() as (entries, _):
            return epsilon(_mechanisms(entries), delta)

    def _read_sealed(self, entry: Entry) -> bytes:
        if entry.state == SENT:
            raise Refusal(f"{_named(entry)} was answered, and a later round after it: it can't be sent again")
        file = self._file(entry.reservation.key)
        reply = file.read_bytes() if file.exists() else b""
        if hashlib.sha256(reply).hexdigest() != entry.sha256:
            raise AntherError(f"{file}: the sealed reply is damaged and another would be a second release; restore it")
        return reply

    def _file(self, key: Key) -> Path:
        """Where a reply lies: named by a hash, since the server chooses the name of the run."""
        run = hashlib.sha256(key[0].encode()).hexdigest()[:16]
        return self._outbox / f"{run}-{key[1]}.reply"

    @contextmanager
    def _opened(self) -> Iterator[tuple[Entries, Callable[[dict[str, Any]], None]]]:
        """The ledger's entries, and the function that appends an event, under an exclusive lock."""
        durable.make_folder(self._path.parent)
        is_new = not self._path.exists()
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if is_new:
                durable.sync_folder(self._path.parent)
            yield _replay(self._lines(handle), self._path), lambda event: _append(handle, event)
        finally:
            os.close(handle)  # and unlock

    def _lines(self, handle: int) -> list[bytes]:
        """Complete lines; a torn last one is cut off: nothing was done yet on the strength of it."""
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.ftruncate(handle, len(whole))
            os.fsync(handle)
        return whole.splitlines()


def _append(handle: int, event: dict[str, Any]) -> None:
    line = json.dumps(event).encode() + b"\n"
    if os.write(handle, line) < len(line):
        raise OSError("the disk is full: the ledger's event was cut short")
    os.fsync(handle)


def _replay(lines: list[bytes], path: Path) -> Entries:
    """The state that the events lead to."""
    entries: Entries = {}
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            key, state = (event["run"], event["round"]), event["state"]
            match state, entries[key].state if key in entries else None:
                case "reserved", None:
                    entries[key] = Entry(_from_event(event))
                case "sealed", "reserved":
                    entries[key] = replace(entries[key], state=SEALED, sha256=event["sha256"])
                case "sent", "sealed":
                    entries[key] = replace(entries[key], state=SENT)
                case _:
                    raise ValueError(f"{state} out of turn")
        except (ValueError, KeyError, TypeError) as error:
            raise AntherError(
                f"{path}:{number}: not an event of the ledger ({error}); restore the file: "
                "without it nobody knows what was shared"
            ) from error
    return entries


def _same(entries: Entries, reservation: Reservation) -> Entry | None:
    """The entry of this (run, round), which must be for the same plan."""
    entry = entries.get(reservation.key)
    if entry and entry.reservation.plan != reservation.plan:
        raise Refusal(f"{_named(entry)} was reserved for another plan: a second one would be a second release")
    return entry


def _named(entry: Entry) -> str:
    return f"round {entry.reservation.round} of run {entry.reservation.run!r}"


def _mechanisms(entries: Entries) -> list[Mechanism]:
    return [entry.reservation.mechanism for entry in entries.values()]


def _to_event(reservation: Reservation) -> dict[str, Any]:
    fields = asdict(replace(reservation, mechanism=NonPrivate()))
    match reservation.mechanism:
        case PoissonGaussian() as gaussian:
            fields["mechanism"] = {"name": "gaussian", **asdict(gaussian)}
        case NonPrivate():
            fields["mechanism"] = {"name": "none"}
    return {"state": RESERVED, **fields}


def _from_event(event: dict[str, Any]) -> Reservation:
    fields = {name: value for name, value in event.items() if name != "state"}
    parameters = dict(fields["mechanism"])
    name = parameters.pop("name")
    if name not in ("gaussian", "none"):
        raise ValueError(f"mechanism {name!r}")
    fields["mechanism"] = PoissonGaussian(**parameters) if name == "gaussian" else NonPrivate()
    return Reservation(**fields)
