"""The privacy ledger of a device, in its own storage: reserved → sealed → sent.

The ledger is a hash-chained, append-only journal. A round is charged when it is reserved, before training, and never
refunded. Once the reply is sealed, only those bytes are ever sent: a second, differently noised reply would be a second
release.

*After a crash while reserved*, all derived data is discarded, and training is repeated under the same reservation, on
the pictures that exist then. If they changed meanwhile, this is still one release of one mechanism, for a picture in
both sets, in one or in none; the seal records which pictures it was made from. Refusing the round, or charging it
twice, would reveal to the server, without noise, that a picture was added or removed. For the same reason a device
whose pictures change between rounds continues: ε of all events bounds the release of each picture, even if it was used
in fewer rounds. An event that is charged to a picture which it did not use only makes the bound larger.

*Guarantees*: charged ≥ released, and one reply for each key, through crashes at any point, power cuts, and two
processes at once. A ledger that is missing, truncated, rolled back, copied from another device or carelessly edited is
detected before anything more is shared (by `privacy.ledger.anchors`, and by the number of events that the server sends
back). *Not covered*: an owner who forges journal, head and marker together, or who stores the same pictures on two
devices, whose ledgers are independent.
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
    """Ledger of one device: journal and marker in its storage, the head outside, sealed replies in `outbox/`.

    Every method reads the journal again under its lock, so that processes on one device see each other's events.

    Raises:
        AntherError: the journal is damaged other than by a torn last line, or contradicts its anchors.
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
        """Charge for a round unless it is already charged. The first reservation enrolls the device.

        Args:
            reservation: the charge.
            check_budget: called with the mechanisms so far and the new one; raises to refuse it. It is called under
                the lock, so that two processes can't both spend the remainder of a budget, and before the charge.
            settles: whether the request for this round implies that the server has finished the run's earlier rounds
                of this purpose (round numbers of one purpose are comparable). These are then marked as sent, and the
                bytes of their replies are removed.

        Returns:
            The history after the reservation.

        Raises:
            RequestRefusedError: this key is reserved for another plan.
        """
        with self._lock_ledger(charging=True) as locked:
            if settles:
                self._settle(locked, reservation)
            if _entry_of_plan(locked.history, reservation.key, reservation.plan) is None:
                check_budget(locked.history.mechanisms, reservation.mechanism)
                locked.append(entries.reserved_event(reservation))
            return locked.history

    def seal(self, reservation: Reservation, reply: bytes) -> bytes:
        """Make the reply to a reserved round final.

        Args:
            reservation: the reserved charge, with the pictures, adapter and noise source that the reply was made from.
            reply: the bytes to send.

        Returns:
            The bytes to send: `reply`, or those of an earlier seal.
        """
        with self._lock_ledger() as locked:
            entry = locked.history.entries[reservation.key]
            if entry.state == RESERVED:
                self._storage.write(_outbox(reservation.key), reply)
                locked.append(entries.sealed_event(reservation, hashlib.sha256(reply).hexdigest()))
                return reply
            return self._read_sealed(entry)

    def sealed(self, key: Key, plan: str, *, echo: int = 0) -> bytes | None:
        """Return the sealed bytes of a round, to be sent or sent again, or None if it is not sealed yet.

        Args:
            key: run, round and purpose.
            plan: fingerprint of the plan.
            echo: number of the ledger's events that was last reported to the server (`protocol.messages.Train.echo`).

        Raises:
            RequestRefusedError: the ledger has fewer events than `echo`, the key belongs to another plan, or its reply
                was removed as sent.
            AntherError: the sealed reply is damaged.
        """
        with self._lock_ledger() as locked:
            if echo > (events := locked.history.events):
                raise RequestRefusedError(
                    f"this device's ledger holds {events} events and the server heard of {echo}: it was rolled back or "
                    "replaced by a new one; its owner has to restore it"
                )
            entry = _entry_of_plan(locked.history, key, plan)
            return None if entry is None or entry.state == RESERVED else self._read_sealed(entry)

    def history(self) -> LedgerHistory:
        """Return the history of all events."""
        with self._lock_ledger() as locked:
            return locked.history

    def entries(self) -> tuple[LedgerEntry, ...]:
        """All entries in the order of their reservation."""
        return tuple(self.history().entries.values())

    def spent(self, delta: float) -> Guarantee:
        """ε of everything reserved so far, whether or not it was sent."""
        return self.history().spent(delta)

    def _settle(self, locked: _LockedLedger, later: Reservation) -> None:
        for key, entry in locked.history.entries.items():
            charge = entry.reservation
            is_earlier = (charge.run, charge.purpose) == (later.run, later.purpose) and charge.round < later.round
            if entry.state == SEALED and is_earlier:
                locked.append(entries.sent_event(key))
                self._storage.remove(_outbox(key))

    def _read_sealed(self, entry: LedgerEntry) -> bytes:
        if entry.state == SENT:
            raise RequestRefusedError(
                f"{_describe(entry)} was answered, and a later round after it: it can't be sent again"
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
    def _lock_ledger(self, *, charging: bool = False) -> Iterator[_LockedLedger]:
        """Lock the ledger, verify it, and yield it for reading and appending.

        Repairs the anchors after a crash. The marker is read only if there is no head, and before anything is charged.

        Raises:
            AntherError: chain or anchors are wrong.
        """
        where = self._storage.where(JOURNAL)
        with self._storage.journal(JOURNAL) as journal:
            try:
                locked = _LockedLedger(journal, where, self._mark)
            except AntherError as error:
                raise AntherError(f"{error}; {RECOVERY_HINT}") from error
            ledger, events = locked.history.ledger, locked.history.events
            head = None if (data := journal.head) is None else anchors.parse_head(data, journal.head_location)
            asks_marker = charging or head is None
            marker = self._marker() if asks_marker else None
            anchors.check(ledger, journal.lines, head, marker, where)
            if ledger:
                if head is None or head.events < events:
                    locked.write_head()
                if asks_marker and marker is None:
                    self._mark(ledger, journal)
            yield locked

    def _marker(self) -> Marker | None:
        data = self._storage.read(MARKER)
        return None if data is None else anchors.parse_marker(data, self._storage.where(MARKER))

    def _mark(self, ledger: str, journal: Journal) -> None:
        self._storage.write(MARKER, Marker(ledger, journal.head_location).to_json())


class _LockedLedger:
    """Locked ledger. The head is updated after every line.

    Args:
        journal: the locked journal.
        where: location of the journal, for messages.
        mark: called with the id and the journal at enrollment, after the first event.

    Raises:
        AntherError: a line is not an event, has a wrong link, or comes out of turn.
    """

    def __init__(self, journal: Journal, where: str, mark: Callable[[str, Journal], None]) -> None:
        self._journal, self._mark = journal, mark
        self._digest, self._last = _digest(journal.lines), hash_chain.chain_head(journal.lines)
        self.history = _histories(self._digest.digest(), journal.lines, where)

    def append(self, event: Mapping[str, Any]) -> None:
        if self.history.ledger is None:
            ledger = secrets.token_hex(16)
            self._append({"state": ENROLLED, "ledger": ledger})
            self._mark(ledger, self._journal)
        self._append(event)

    def write_head(self) -> None:
        self._journal.write_head(JournalHead(str(self.history.ledger), self.history.events, self._last).to_json())

    def _append(self, event: Mapping[str, Any]) -> None:
        stamped = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **event}
        line = hash_chain.encode_event(stamped, self._last)
        history, before = entries.apply_event(self.history, stamped), self._digest.digest()
        self._journal.append(line)
        self._digest.update(line + b"\n")
        self._last, self.history = hash_chain.chain_head([line]), history
        _histories.replace(before, self._digest.digest(), history)
        self.write_head()


class _HistoryCache:
    """Least-recently-used cache of histories, by a digest of the journal's lines.

    A device reads its ledger several times a round, mostly after its own events. The cache avoids parsing it again.
    """

    def __init__(self, max_size: int) -> None:
        self._cached: dict[bytes, LedgerHistory] = {}  # least recently read first
        self._max_size, self._lock = max_size, threading.Lock()

    def __call__(self, digest: bytes, lines: Sequence[bytes], where: str) -> LedgerHistory:
        """Return the history of the given lines; AntherError as from `entries.replay`."""
        with self._lock:
            history = self._cached.pop(digest, None)
        if history is None:
            history = entries.replay(lines, where)
        self.replace(digest, digest, history)
        return history

    def replace(self, before: bytes, digest: bytes, history: LedgerHistory) -> None:
        """Cache the history of extended lines, in place of the history before the extension."""
        with self._lock:
            self._cached.pop(before, None)
            self._cached[digest] = history
            if len(self._cached) > self._max_size:
                del self._cached[next(iter(self._cached))]


_histories = _HistoryCache(max_size=1024)
"""More than the devices that a simulation runs at once (`simulations.grid.cohort.WAVE`)."""


def _digest(lines: Sequence[bytes]) -> hashlib._Hash:
    """Compute the SHA-256 of all lines with their line ends, as an object that can be updated with further lines."""
    return hashlib.sha256(b"\n".join([*lines, b""]))


def _outbox(key: Key) -> str:
    """Return the name of a reply's blob. It is a hash, since the server chooses the name of the run."""
    run, number, purpose = key
    return f"{OUTBOX}/{hashlib.sha256(run.encode()).hexdigest()[:16]}-{number}-{purpose}.reply"


def _entry_of_plan(history: LedgerHistory, key: Key, plan: str) -> LedgerEntry | None:
    """Return the entry of a key; None without one; RequestRefusedError if it was reserved for another plan."""
    entry = history.entries.get(key)
    if entry and entry.reservation.plan != plan:
        raise RequestRefusedError(
            f"{_describe(entry)} was reserved for another plan: a second one would be a second release"
        )
    return entry


def _describe(entry: LedgerEntry) -> str:
    purpose = "" if entry.reservation.purpose == TRAIN else f"the {entry.reservation.purpose} of "
    return f"{purpose}round {entry.reservation.round} of run {entry.reservation.run!r}"
