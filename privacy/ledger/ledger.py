"""What this device has promised, kept in its own storage: reserved → sealed → sent.

A hash-chained journal that only grows. A round is charged when it is reserved, before training, and never refunded.
Once the reply is sealed, only those bytes are ever sent: a second, differently noised reply would be a second release.

*A crash while reserved* discards everything derived and trains again under the same reservation, on the pictures that
are there then. When they changed meanwhile it is still one release of one mechanism, for a picture in both sets, in
one or in none; the seal records which pictures it was made from. To refuse the round, or to charge it twice, would
tell the server, without noise, that a picture was added or removed. For the same reason a device whose pictures change
from round to round goes on: ε of all events bounds what was shared of each picture, for however few it was there. That
one event was charged for a picture which it never touched only makes the bound larger.

*What is claimed*: charged ≥ released and one reply for each key through crashes at any point, power cuts, two processes
at once; and that a ledger which is missing, shortened, rolled back, copied from another device or carelessly edited is
found before anything more is shared (`privacy.ledger.anchors`; the server's echo besides). Not claimed: anything against an
owner who forges journal, head and marker together, or who holds the same pictures on two devices, whose ledgers don't
know of each other.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from common.errors import AntherError
from privacy.accounting import Guarantee, Mechanism
from privacy.ledger import anchors, entries, hash_chain
from privacy.ledger.anchors import RECOVERY_HINT, JournalHead, Marker
from privacy.ledger.entries import (
    ENROLLED,
    MEASURE,
    RESERVED,
    SEALED,
    SENT,
    TRAIN,
    Key,
    LedgerEntry,
    LedgerHistory,
    Reservation,
)
from privacy.policy import RequestRefusedError
from privacy.storage import Journal, Storage

__all__ = [
    "JOURNAL",
    "MARKER",
    "MEASURE",
    "OUTBOX",
    "RESERVED",
    "SEALED",
    "SENT",
    "TRAIN",
    "DeviceLedger",
    "Key",
    "LedgerEntry",
    "LedgerHistory",
    "Reservation",
]

JOURNAL, OUTBOX, MARKER = "ledger.jsonl", "outbox", "enrolled"


class DeviceLedger:
    """The ledger of one device: journal and marker in its storage, the head outside, sealed replies in `outbox/`.

    Every method reads the journal again under its lock, so that processes on one device see each other's events.

    Raises:
        AntherError: the journal is damaged other than by a torn last line, or its anchors don't agree with it.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def reserve(
        self,
        reservation: Reservation,
        check_budget: Callable[[Sequence[Mechanism], Mechanism], None],
        *,
        settles: bool = False,
    ) -> LedgerHistory:
        """Charge for a round, unless it is charged for already; enrol the device at its first.

        Args:
            admit: given the mechanisms so far and the new one, raises to refuse it; called under the lock, so that
                two processes can't both take the last of a budget, and before anything is charged.
            settles: the server, that asks for this round, has moved past the run's earlier ones of this purpose, whose
                numbers are of one kind: they are noted as sent, and the bytes of their replies are removed.

        Returns:
            What the ledger holds now.

        Raises:
            Refusal: this key is reserved for another plan.
        """
        with self._opened(charging=True) as book:
            if settles:
                self._settle(book, reservation)
            if _of_plan(book.history, reservation.key, reservation.plan) is None:
                check_budget(book.history.mechanisms, reservation.mechanism)
                book.append(entries.reserved_event(reservation))
            return book.history

    def seal(self, reservation: Reservation, reply: bytes) -> bytes:
        """Fix the reply to a reserved round; returns the bytes to send: an earlier seal's, if there is one.

        Args:
            reservation: as reserved, with the pictures, adapter and noise that the reply was really made from.
        """
        with self._opened() as book:
            entry = book.history.entries[reservation.key]
            if entry.state == RESERVED:
                self._storage.write(_outbox(reservation.key), reply)
                book.append(entries.sealed_event(reservation, hashlib.sha256(reply).hexdigest()))
                return reply
            return self._read_sealed(entry)

    def sealed(self, key: Key, plan: str, *, echo: int = 0) -> bytes | None:
        """The bytes to send (again) for this round; None if it is not sealed yet.

        Args:
            echo: how many events the server has heard of (`protocol.messages.Train.echo`).

        Raises:
            Refusal: the ledger has fewer events than that, the key belongs to another plan, or its reply was removed
                as sent.
            AntherError: the sealed reply is damaged.
        """
        with self._opened() as book:
            if echo > (events := book.history.events):
                raise RequestRefusedError(
                    f"this device's ledger holds {events} events and the server heard of {echo}: it was rolled back or "
                    "begun anew; its owner has to restore it"
                )
            entry = _of_plan(book.history, key, plan)
            return None if entry is None or entry.state == RESERVED else self._read_sealed(entry)

    def history(self) -> LedgerHistory:
        """All of it."""
        with self._opened() as book:
            return book.history

    def entries(self) -> tuple[LedgerEntry, ...]:
        """Every reservation in the order made."""
        return tuple(self.history().entries.values())

    def spent(self, delta: float) -> Guarantee:
        """ε of everything reserved so far, whether or not it was sent."""
        return self.history().spent(delta)

    def _settle(self, book: _Book, later: Reservation) -> None:
        for key, entry in book.history.entries.items():
            made = entry.reservation
            is_earlier = (made.run, made.purpose) == (later.run, later.purpose) and made.round < later.round
            if entry.state == SEALED and is_earlier:
                book.append(entries.sent_event(key))
                self._storage.remove(_outbox(key))

    def _read_sealed(self, entry: LedgerEntry) -> bytes:
        if entry.state == SENT:
            raise RequestRefusedError(
                f"{_named(entry)} was answered, and a later round after it: it can't be sent again"
            )
        name = _outbox(entry.reservation.key)
        reply = self._storage.read(name) or b""
        if hashlib.sha256(reply).hexdigest() != entry.sha256:
            raise AntherError(
                f"{self._storage.where(name)}: the sealed reply is damaged and another would be a second release; "
                "restore it"
            )
        return reply

    @contextmanager
    def _opened(self, *, charging: bool = False) -> Iterator[_Book]:
        """What the ledger holds, to be read and appended to, under an exclusive lock.

        Raises AntherError unless chain and anchors hold; mends what a crash has left of them. The marker is looked at
        where there is nothing else to tell by, and before anything is charged.
        """
        where = self._storage.where(JOURNAL)
        with self._storage.journal(JOURNAL) as journal:
            try:
                book = _Book(journal, where, self._mark)
            except AntherError as error:
                raise AntherError(f"{error}; {RECOVERY_HINT}") from error
            ledger, events = book.history.ledger, book.history.events
            head = None if (data := journal.head) is None else anchors.parse_head(data, journal.head_location)
            asks_marker = charging or head is None
            marker = self._marker() if asks_marker else None
            anchors.check(ledger, journal.lines, head, marker, where)
            if ledger:
                if head is None or head.events < events:
                    book.keep_head()
                if asks_marker and marker is None:
                    self._mark(ledger, journal)
            yield book

    def _marker(self) -> Marker | None:
        data = self._storage.read(MARKER)
        return None if data is None else anchors.parse_marker(data, self._storage.where(MARKER))

    def _mark(self, ledger: str, journal: Journal) -> None:
        self._storage.write(MARKER, Marker(ledger, journal.head_location).to_json())


class _Book:
    """A journal whose lock is held, and the history that it leads to; after every line the head follows.

    Args:
        mark: called with the id and the journal once the ledger is enrolled, at its first event.

    Raises:
        AntherError: a line is no event, is out of turn, or doesn't follow the one before it.
    """

    def __init__(self, journal: Journal, where: str, mark: Callable[[str, Journal], None]) -> None:
        self._journal, self._mark = journal, mark
        self._digest, self._last = _digest(journal.lines), hash_chain.chain_head(journal.lines)
        self.history = _replayed(self._digest.digest(), journal.lines, where)

    def append(self, event: Mapping[str, Any]) -> None:
        if self.history.ledger is None:
            ledger = secrets.token_hex(16)
            self._append({"state": ENROLLED, "ledger": ledger})
            self._mark(ledger, self._journal)
        self._append(event)

    def keep_head(self) -> None:
        self._journal.write_head(JournalHead(str(self.history.ledger), self.history.events, self._last).to_json())

    def _append(self, event: Mapping[str, Any]) -> None:
        stamped = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **event}
        line = hash_chain.encode_event(stamped, self._last)
        history, before = entries.apply_event(self.history, stamped), self._digest.digest()
        self._journal.append(line)
        self._digest.update(line + b"\n")
        self._last, self.history = hash_chain.chain_head([line]), history
        _replayed.go_on(before, self._digest.digest(), history)
        self.keep_head()


class _Replayed:
    """The histories that journals lead to; those last read are kept, under a digest of their lines.

    A device looks at its ledger several times a round, mostly after events of its own: a look then costs no parsing.
    """

    def __init__(self, most: int) -> None:
        self._kept: dict[bytes, LedgerHistory] = {}  # least recently read first
        self._most, self._lock = most, threading.Lock()

    def __call__(self, digest: bytes, lines: Sequence[bytes], where: str) -> LedgerHistory:
        """Raises AntherError for a line that is no event, one out of turn, or one that doesn't follow."""
        with self._lock:
            history = self._kept.pop(digest, None)
        if history is None:
            history = entries.replay(lines, where)
        self.go_on(digest, digest, history)
        return history

    def go_on(self, before: bytes, digest: bytes, history: LedgerHistory) -> None:
        """Keep the history of these lines instead of that of those before."""
        with self._lock:
            self._kept.pop(before, None)
            self._kept[digest] = history
            if len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]


_replayed = _Replayed(most=1024)
"""More than the devices that a simulation drives at once (`simulations.grid.cohort.WAVE`)."""


def _digest(lines: Sequence[bytes]) -> hashlib._Hash:
    """Of all lines with their ends, to be updated with the next."""
    return hashlib.sha256(b"\n".join([*lines, b""]))


def _outbox(key: Key) -> str:
    """Where a reply lies: named by a hash, since the server chooses the name of the run."""
    run, number, purpose = key
    return f"{OUTBOX}/{hashlib.sha256(run.encode()).hexdigest()[:16]}-{number}-{purpose}.reply"


def _of_plan(history: LedgerHistory, key: Key, plan: str) -> LedgerEntry | None:
    """The entry of this key, which must be for the same plan."""
    entry = history.entries.get(key)
    if entry and entry.reservation.plan != plan:
        raise RequestRefusedError(
            f"{_named(entry)} was reserved for another plan: a second one would be a second release"
        )
    return entry


def _named(entry: LedgerEntry) -> str:
    purpose = "" if entry.reservation.purpose == TRAIN else f"the {entry.reservation.purpose} of "
    return f"{purpose}round {entry.reservation.round} of run {entry.reservation.run!r}"
