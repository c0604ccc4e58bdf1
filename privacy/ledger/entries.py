"""Events of a ledger: one enrollment, then reservations and their progress.

    {"state": "enrolled", "ledger": id}
    {"state": "reserved", …everything that the round is charged for}
    {"state": "sealed", …its key, the digest of the reply, and the data that the reply was made from}
    {"state": "sent", …its key}

Each line also has `at`, the time on the device's clock, and `previous`, the link to the line before
(`privacy.ledger.hash_chain`). These names and values are stored and can't change.
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
"""Run, round and purpose: charged once and answered once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Charge for one round. It is never sent: the fingerprint of the pictures could identify their owner."""

    run: str
    round: int
    purpose: str = TRAIN
    base: str
    """Content hash of the base."""
    adapter: str
    """SHA-256 of the adapter that the server sent."""
    plan: str
    """Fingerprint of the plan. A key is answered for one plan only."""
    data: str
    """Fingerprint of the pictures."""
    mechanism: Mechanism
    clip: float | None
    """C of a Gaussian mechanism; None for other mechanisms."""
    release: bool
    """Whether the noised result is a private release. False for simulated noise, which is charged too."""
    unit: str = IMAGE
    relation: str = ADD_OR_REMOVE_ONE

    @property
    def key(self) -> Key:
        return self.run, self.round, self.purpose


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Reservation and its state."""

    reservation: Reservation
    """Charge of the round. Once sealed, it has the adapter, pictures and noise source of the reply."""
    state: str = RESERVED
    sha256: str | None = None
    """Digest of the sealed reply."""
    at: tuple[str, ...] = field(default=(), compare=False)
    """Times at which the round was reserved, sealed and sent, as far as it was: ISO 8601, on the device's clock."""


@dataclass(frozen=True, slots=True)
class LedgerHistory:
    """State of a ledger after its events."""

    ledger: str | None = None
    """Random id drawn at enrollment; None before."""
    events: int = 0
    """Number of lines, including the enrollment."""
    entries: Mapping[Key, LedgerEntry] = field(default_factory=dict)
    """Entries in the order of their reservation."""

    @property
    def mechanisms(self) -> list[Mechanism]:
        """Return all charged mechanisms."""
        return [entry.reservation.mechanism for entry in self.entries.values()]

    def spent(self, delta: float) -> Guarantee:
        """Compute ε at δ = `delta` of all reservations, whether or not their replies were sent."""
        return epsilon(self.mechanisms, delta)


def replay(lines: Sequence[bytes], where: str) -> LedgerHistory:
    """Compute the history from the lines of a journal.

    Raises:
        AntherError: a line is not an event, has a wrong link, or comes out of turn.
    """
    ledger: str | None = None
    entries: dict[Key, LedgerEntry] = {}
    for number, event in enumerate(hash_chain.parse_events(lines, where), start=1):
        try:
            ledger = _add_event(entries, ledger, event)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AntherError(f"{where}:{number}: not an event of the ledger ({error}); restore the file") from error
    return LedgerHistory(ledger, len(lines), entries)


def apply_event(history: LedgerHistory, event: Mapping[str, Any]) -> LedgerHistory:
    """Return the history after one more well-formed event; ValueError if it comes out of turn."""
    entries = dict(history.entries)
    return LedgerHistory(_add_event(entries, history.ledger, event), history.events + 1, entries)


def reserved_event(reservation: Reservation) -> dict[str, Any]:
    """Return the event that charges for a round."""
    fields = {name.name: getattr(reservation, name.name) for name in dataclasses.fields(reservation)}
    match reservation.mechanism:
        case PoissonGaussian() as gaussian:
            mechanism = {"name": "gaussian", **vars(gaussian)}
        case NonPrivate():
            mechanism = {"name": "none"}
    return {"state": RESERVED, **fields, "mechanism": mechanism}


def sealed_event(reservation: Reservation, sha256: str) -> dict[str, Any]:
    """Return the event that makes a reply final and records its inputs."""
    made_from = {name: getattr(reservation, name) for name in _MADE_FROM}
    return {"state": SEALED, **_key(reservation.key), "sha256": sha256, **made_from}


def sent_event(key: Key) -> dict[str, Any]:
    """Return the event after which the reply is never requested again."""
    return {"state": SENT, **_key(key)}


_MADE_FROM = ("adapter", "data", "release")  # inputs that may differ if training of a reserved round is repeated


def _key(key: Key) -> dict[str, Any]:
    return dict(zip(("run", "round", "purpose"), key, strict=True))


def _add_event(entries: dict[Key, LedgerEntry], ledger: str | None, event: Mapping[str, Any]) -> str:
    """Add one more event to the entries of a ledger, whose id is None before its first event; return the id."""
    if (event["state"] == ENROLLED) != (ledger is None):
        raise ValueError("a ledger begins with its one enrollment")
    if ledger is None:
        return str(event["ledger"])
    key = (event["run"], event["round"], event["purpose"])
    entries[key] = _next_entry(entries.get(key), event)
    return ledger


def _next_entry(entry: LedgerEntry | None, event: Mapping[str, Any]) -> LedgerEntry:
    """Return the entry after one more event; ValueError if the event comes out of turn."""
    state, now = event["state"], (str(event["at"]),)
    match state, entry:
        case "reserved", None:
            return LedgerEntry(_reservation(event), at=now)
        case "sealed", LedgerEntry(reservation, "reserved", _, at):
            made_from = {name: _interned(event[name]) for name in _MADE_FROM}
            return LedgerEntry(replace(reservation, **made_from), SEALED, str(event["sha256"]), (*at, *now))
        case "sent", LedgerEntry(_, "sealed", _, at):
            return replace(entry, state=SENT, at=(*at, *now))
    raise ValueError(f"{state} out of turn")


def _reservation(event: Mapping[str, Any]) -> Reservation:
    fields = {name: _interned(value) for name, value in event.items() if name not in ("state", "at", "mechanism")}
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


def _interned(value: Any) -> Any:
    """Share one string object between the ledgers of a simulated fleet."""
    return sys.intern(value) if isinstance(value, str) else value
