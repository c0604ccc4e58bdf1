"""What this device has promised, kept in its own storage: reserved → sealed → sent.

A journal of JSON lines that only grows. A round is charged when it is reserved, before training, and never refunded:
a crash while reserved discards everything derived and trains again under the same reservation. Once the reply is
sealed, only those bytes are ever sent: a second, differently noised reply would be a second release.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from conf.errors import AntherError
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
from privacy.storage import Storage

JOURNAL, OUTBOX = "ledger.jsonl", "outbox"
RESERVED, SEALED, SENT = "reserved", "sealed", "sent"
TRAIN, MEASURE = "train", "measure"
Key = tuple[str, int, str]


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
    purpose: str = TRAIN
    """What is made of the pictures: an update, or a measure of how an adapter does on them."""

    @property
    def key(self) -> Key:
        return self.run, self.round, self.purpose


@dataclass(frozen=True, slots=True)
class Entry:
    """One reservation and how far it has come."""

    reservation: Reservation
    state: str = RESERVED
    sha256: str | None = None
    """Of the sealed reply."""


Entries = Mapping[Key, Entry]


class Ledger:
    """The ledger of one device: the journal `ledger.jsonl` of its storage, and sealed replies in `outbox/`.

    Every method reads the journal again under its lock, so that processes on one device see each other's events.

    Raises:
        AntherError: the journal is damaged other than by a torn last line.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

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
                self._storage.write(_outbox(key), reply)
                append({"state": SEALED, **_named_key(key), "sha256": digest})
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
                append({"state": SENT, **_named_key(key)})
                self._storage.remove(_outbox(key))

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
        name = _outbox(entry.reservation.key)
        reply = self._storage.read(name) or b""
        if hashlib.sha256(reply).hexdigest() != entry.sha256:
            raise AntherError(
                f"{self._storage.where(name)}: the sealed reply is damaged and another would be a second release; "
                "restore it"
            )
        return reply

    @contextmanager
    def _opened(self) -> Iterator[tuple[Entries, Callable[[dict[str, Any]], None]]]:
        """The ledger's entries, and the function that appends an event, under an exclusive lock."""
        with self._storage.journal(JOURNAL) as journal:
            entries = _replayed(journal.lines, self._storage.where(JOURNAL))
            yield entries, lambda event: journal.append(json.dumps(event).encode())


class _Replayed:
    """The entries that journals lead to; those last read are kept, under a digest of their lines.

    A device looks at its ledger five times a round, and appends one event in between at most: a look then costs the
    new line, not all of them.
    """

    def __init__(self, most: int) -> None:
        self._kept: dict[bytes, Entries] = {}  # least recently read first
        self._most, self._lock = most, threading.Lock()

    def __call__(self, lines: Sequence[bytes], where: str) -> Entries:
        """Raises AntherError for a line that is no event, or one out of turn."""
        digest = _digest(lines)
        with self._lock:
            entries = self._kept.pop(digest, None)
            if entries is None:
                before = self._kept.pop(_digest(lines[:-1]), None)
                entries = _replay(before or {}, lines, 0 if before is None else len(lines) - 1, where)
            self._kept[digest] = entries
            if len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
        return entries


_replayed = _Replayed(most=1024)
"""More than the devices that a simulation drives at once (`simulations.grid.WAVE`)."""


def _digest(lines: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"\n".join(lines)).digest()


def _replay(entries: Entries, lines: Sequence[bytes], start: int, where: str) -> Entries:
    """The entries that the lines from `start` on lead to, where those before it lead to `entries`."""
    found = dict(entries)
    for number, line in enumerate(lines[start:], start=start + 1):
        try:
            event = json.loads(line)
            key, state = (event["run"], event["round"], event["purpose"]), event["state"]
            match state, found[key].state if key in found else None:
                case "reserved", None:
                    found[key] = Entry(_reservation(line))
                case "sealed", "reserved":
                    found[key] = replace(found[key], state=SEALED, sha256=event["sha256"])
                case "sent", "sealed":
                    found[key] = replace(found[key], state=SENT)
                case _:
                    raise ValueError(f"{state} out of turn")
        except (ValueError, KeyError, TypeError) as error:
            raise AntherError(
                f"{where}:{number}: not an event of the ledger ({error}); restore the file: "
                "without it nobody knows what was shared"
            ) from error
    return found


def _outbox(key: Key) -> str:
    """Where a reply lies: named by a hash, since the server chooses the name of the run."""
    run = hashlib.sha256(key[0].encode()).hexdigest()[:16]
    return f"{OUTBOX}/{run}-{key[1]}-{key[2]}.reply"


def _named_key(key: Key) -> dict[str, Any]:
    return dict(zip(("run", "round", "purpose"), key, strict=True))


def _same(entries: Entries, reservation: Reservation) -> Entry | None:
    """The entry of this (run, round, purpose), which must be for the same plan."""
    entry = entries.get(reservation.key)
    if entry and entry.reservation.plan != reservation.plan:
        raise Refusal(f"{_named(entry)} was reserved for another plan: a second one would be a second release")
    return entry


def _named(entry: Entry) -> str:
    purpose = "" if entry.reservation.purpose == TRAIN else f"the {entry.reservation.purpose} of "
    return f"{purpose}round {entry.reservation.round} of run {entry.reservation.run!r}"


def _mechanisms(entries: Entries) -> list[Mechanism]:
    return [entry.reservation.mechanism for entry in entries.values()]


def _to_event(reservation: Reservation) -> dict[str, Any]:
    match reservation.mechanism:
        case PoissonGaussian() as gaussian:
            mechanism = {"name": "gaussian", **vars(gaussian)}
        case NonPrivate():
            mechanism = {"name": "none"}
    return {"state": RESERVED, **vars(reservation), "mechanism": mechanism}


@lru_cache(maxsize=64)
def _reservation(line: bytes) -> Reservation:
    """The reservation that a line makes; the same object for the many simulated devices of one plan."""
    event = json.loads(line)
    fields = {name: value for name, value in event.items() if name != "state"}
    parameters = dict(fields["mechanism"])
    name = parameters.pop("name")
    if name not in ("gaussian", "none"):
        raise ValueError(f"mechanism {name!r}")
    fields["mechanism"] = PoissonGaussian(**parameters) if name == "gaussian" else NonPrivate()
    return Reservation(**fields)
