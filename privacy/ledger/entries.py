"""What a ledger's lines say: one enrolment, then reservations and how far each has come.

    {"state": "enrolled", "ledger": id}
    {"state": "reserved", …everything that the round is charged for}
    {"state": "sealed", …its key, the digest of the reply, and what that was really made from}
    {"state": "sent", …its key}

Each line also holds `at`, the device's clock, and `previous`, its link to the line before (`privacy.ledger.hash_chain`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from common.errors import AntherError
from privacy.accounting import (
    ADD_OR_REMOVE_ONE,
    IMAGE,
    Guarantee,
    Mechanism,
    NonPrivate,
    PoissonGaussian,
    epsilon,
)
from privacy.ledger import hash_chain

ENROLLED, RESERVED, SEALED, SENT = "enrolled", "reserved", "sealed", "sent"
TRAIN, MEASURE = "train", "measure"
Key = tuple[str, int, str]
"""Run, round and purpose: what is charged once and answered once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """What one round is charged for. It stays on the device: the fingerprint would tell whose pictures these are."""

    run: str
    round: int
    purpose: str = TRAIN
    base: str
    """Content hash of the base."""
    adapter: str
    """SHA-256 of the adapter that was sent."""
    plan: str
    """Fingerprint of the plan: one key is answered by one plan only."""
    data: str
    """Fingerprint of the pictures."""
    mechanism: Mechanism
    clip: float | None
    """C, with a Gaussian mechanism."""
    release: bool
    """False for simulated noise, which is charged all the same."""
    unit: str = IMAGE
    relation: str = ADD_OR_REMOVE_ONE

    @property
    def key(self) -> Key:
        return self.run, self.round, self.purpose


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One reservation and how far it has come."""

    reservation: Reservation
    """Once sealed, with the adapter, pictures and noise that the reply was made from."""
    state: str = RESERVED
    sha256: str | None = None
    """Of the sealed reply."""
    at: tuple[str, ...] = field(default=(), compare=False)
    """When it was reserved, sealed and sent, as far as it has come: ISO 8601, by the device's clock."""


@dataclass(frozen=True, slots=True)
class LedgerHistory:
    """What a ledger's lines lead to."""

    ledger: str | None = None
    """The id drawn at enrolment; None before it."""
    events: int = 0
    """Lines, the enrolment's among them."""
    entries: Mapping[Key, LedgerEntry] = field(default_factory=dict)
    """In the order reserved."""

    @property
    def mechanisms(self) -> list[Mechanism]:
        """What was charged for."""
        return [entry.reservation.mechanism for entry in self.entries.values()]

    def spent(self, delta: float) -> Guarantee:
        """ε of everything reserved, whether or not it was sent."""
        return epsilon(self.mechanisms, delta)


def replay(lines: Sequence[bytes], where: str) -> LedgerHistory:
    """The history that `lines` lead to.

    Raises:
        AntherError: a line doesn't follow the one before it, is no event, or comes out of turn.
    """
    ledger: str | None = None
    entries: dict[Key, LedgerEntry] = {}
    for number, event in enumerate(hash_chain.parse_events(lines, where), start=1):
        try:
            ledger = _enter(entries, ledger, event)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AntherError(f"{where}:{number}: not an event of the ledger ({error}); restore the file") from error
    return LedgerHistory(ledger, len(lines), entries)


def apply_event(history: LedgerHistory, event: Mapping[str, Any]) -> LedgerHistory:
    """The history after one more event, which must be of its form; ValueError if it isn't its turn."""
    entries = dict(history.entries)
    return LedgerHistory(_enter(entries, history.ledger, event), history.events + 1, entries)


def reserved_event(reservation: Reservation) -> dict[str, Any]:
    """The event that charges for a round."""
    fields = {name.name: getattr(reservation, name.name) for name in dataclasses.fields(reservation)}
    match reservation.mechanism:
        case PoissonGaussian() as gaussian:
            mechanism = {"name": "gaussian", **vars(gaussian)}
        case NonPrivate():
            mechanism = {"name": "none"}
    return {"state": RESERVED, **fields, "mechanism": mechanism}


def sealed_event(reservation: Reservation, sha256: str) -> dict[str, Any]:
    """The event that fixes the reply, and says what it was made from."""
    made_from = {name: getattr(reservation, name) for name in _MADE_FROM}
    return {"state": SEALED, **_key(reservation.key), "sha256": sha256, **made_from}


def sent_event(key: Key) -> dict[str, Any]:
    """The event after which nobody asks for the reply again."""
    return {"state": SENT, **_key(key)}


_MADE_FROM = ("adapter", "data", "release")  # a reserved round is trained anew, maybe on other ones


def _key(key: Key) -> dict[str, Any]:
    return dict(zip(("run", "round", "purpose"), key, strict=True))


def _enter(entries: dict[Key, LedgerEntry], ledger: str | None, event: Mapping[str, Any]) -> str:
    """Put one more event into the entries of a ledger, None before its first; its id."""
    if (event["state"] == ENROLLED) != (ledger is None):
        raise ValueError("a ledger begins with its one enrolment")
    if ledger is None:
        return str(event["ledger"])
    key = (event["run"], event["round"], event["purpose"])
    entries[key] = _next(entries.get(key), event)
    return ledger


def _next(entry: LedgerEntry | None, event: Mapping[str, Any]) -> LedgerEntry:
    """The entry after one more event; ValueError if it isn't that event's turn."""
    state, now = event["state"], (str(event["at"]),)
    match state, entry:
        case "reserved", None:
            return LedgerEntry(_reservation(event), at=now)
        case "sealed", LedgerEntry(reservation, "reserved", _, at):
            made_from = {name: _shared(event[name]) for name in _MADE_FROM}
            return LedgerEntry(replace(reservation, **made_from), SEALED, str(event["sha256"]), (*at, *now))
        case "sent", LedgerEntry(_, "sealed", _, at):
            return replace(entry, state=SENT, at=(*at, *now))
    raise ValueError(f"{state} out of turn")


def _reservation(event: Mapping[str, Any]) -> Reservation:
    fields = {name: _shared(value) for name, value in event.items() if name not in ("state", "at", "mechanism")}
    mechanism = dict(event["mechanism"])
    return Reservation(**fields, mechanism=_mechanism(mechanism.pop("name"), tuple(mechanism.items())))


@lru_cache(maxsize=64)
def _mechanism(name: str, parameters: tuple[tuple[str, Any], ...]) -> Mechanism:
    match name:
        case "gaussian":
            return PoissonGaussian(**dict(parameters))
        case "none":
            return NonPrivate(**dict(parameters))
    raise ValueError(f"mechanism {name!r}")


def _shared(value: Any) -> Any:
    """One object for the strings that the ledgers of a simulated fleet have in common."""
    return sys.intern(value) if isinstance(value, str) else value
