"""Ledger of a run's device-level privacy, next to its checkpoints: `ledger.jsonl`, reserved → released.

It is an append-only, hash-chained journal. A round is charged when it is reserved, before any message is sent, and
never refunded: an aborted round is repeated under a second reservation, and both are charged. Each checkpoint records
the events at its time (`Anchor`), so that a missing, shortened or edited ledger is distinguished from a new one.

The ledger belongs to the trusted server, as do the checkpoints. Without secret sampling it contains the names of the
sampled devices; with it, no names. It detects accidents, rollback and careless edits, but not an operator who forges
the whole ledger. Each run has its own ledger: guarantees of several runs for the same device add up, which is left to
the operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from common import strict_json
from common.errors import AntherError
from privacy.accounting import DEVICE, Guarantee, PoissonGaussian, epsilon, with_strict
from privacy.ledger import hash_chain
from privacy.ledger.entries import RESERVED, TRAIN
from privacy.storage import Storage
from strategies.central_dp import Anchor, BudgetExhausted, Charge, DeviceBudget

JOURNAL = "ledger.jsonl"
RELEASED = "released"


class ServerLedger:
    """Privacy ledger of one run, in its folder.

    Every method reads the journal again under its lock.

    Raises:
        AntherError: the journal was edited, or is damaged other than by a torn last line.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def charges(self) -> list[Charge]:
        """Return all reservations, in order."""
        with self._storage.journal(JOURNAL) as journal:
            return list(self._charges(journal.lines))

    def participations(self) -> Mapping[str, int]:
        """Count the rounds in which each device was sampled for training, including aborted ones."""
        return Counter(name for charge in self.charges() if charge.purpose == TRAIN for name in charge.asked or ())

    def reserve(self, charge: Charge, budget: DeviceBudget) -> Guarantee:
        """Charge for a round.

        Returns:
            The guarantee of the device with the largest cost, including the planned cost of `budget.other_releases`.

        Raises:
            BudgetExhausted: the round would exceed the budget; nothing was written.
        """
        with self._storage.journal(JOURNAL) as journal:
            spent = spent_guarantee([*self._charges(journal.lines), charge], budget)
            if spent.value > budget.epsilon:
                raise BudgetExhausted(
                    f"round {charge.round} would bring a device to {spent}, and the run may spend ε={budget.epsilon:g}"
                )
            event = {"state": RESERVED, **strict_json.loads(strict_json.dumps(charge))}
            journal.append(hash_chain.encode_event(event, hash_chain.chain_head(journal.lines)))
            return spent

    def release(self, run: str, round: int) -> None:
        """Record, once, that a checkpoint contains a round's adapter. This doesn't change the charges."""
        with self._storage.journal(JOURNAL) as journal:
            events = self._events(journal.lines)
            of_round = [
                event["state"]
                for event in events
                if (event["run"], event["round"]) == (run, round) and event.get("purpose", TRAIN) == TRAIN
            ]
            if of_round[-1:] == [RESERVED]:
                event = {"state": RELEASED, "run": run, "round": round}
                journal.append(hash_chain.encode_event(event, hash_chain.chain_head(journal.lines)))

    def anchor(self) -> Anchor:
        """Return the ledger's state, to be stored with a checkpoint."""
        with self._storage.journal(JOURNAL) as journal:
            return Anchor(events=len(journal.lines), head=hash_chain.chain_head(journal.lines))

    def check(self, anchor: Anchor | None) -> None:
        """Check that the ledger starts with the events of this anchor.

        Raises:
            AntherError: it doesn't start with them.
        """
        with self._storage.journal(JOURNAL) as journal:
            self._events(journal.lines)
            if anchor is None or hash_chain.starts_with(journal.lines, anchor.events, anchor.head):
                return
            where = self._storage.where(JOURNAL)
            events = len(journal.lines)
        state = (
            f"contains {events} of the {anchor.events} events that the checkpoint names"
            if events < anchor.events
            else "is not the one that the checkpoint names"
        )
        raise AntherError(
            f"{where}: {state}: the privacy guarantee is unknown without it; restore it from a backup, or start a new "
            "run in another folder"
        )

    def _events(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        return hash_chain.parse_events(lines, self._storage.where(JOURNAL))

    def _charges(self, lines: Sequence[bytes]) -> Iterator[Charge]:
        for number, event in enumerate(self._events(lines), start=1):
            state = event.pop("state", None)
            if state == RELEASED:
                continue
            try:
                if state != RESERVED:
                    raise ValueError(f"state {state!r}")
                yield strict_json.from_plain(Charge, event)
            except ValueError as error:
                where = f"{self._storage.where(JOURNAL)}:{number}"
                raise AntherError(f"{where}: not an event ({error}); restore the file from a backup") from error


def spent_guarantee(charges: Iterable[Charge], budget: DeviceBudget) -> Guarantee:
    """Compose the charges of the device with the largest cost and the planned evaluations of `budget.other_releases`.

    Without secret sampling, a device is charged for the rounds in which it was sampled. With secret sampling, every
    device is charged for every round: the sampling rate accounts for the chance that it wasn't sampled. `seen` is the ε
    against an observer who sees the sample.
    """
    common: Counter[PoissonGaussian] = Counter()
    planned = Counter({replace(event, steps=1): event.steps for event in budget.other_releases})
    of_device: dict[str, Counter[PoissonGaussian]] = {}
    for charge in charges:
        if charge.purpose != TRAIN:
            planned[charge.mechanism] -= 1
        if charge.asked is None:
            common[charge.mechanism] += 1
        for name in charge.asked or ():
            of_device.setdefault(name, Counter())[charge.mechanism] += 1
    histories = [Counter[PoissonGaussian](), *of_device.values()]
    common += +planned  # only the evaluations that have not been charged yet
    events = [list((common + history).elements()) for history in _maximal(histories)]
    guarantees = [with_strict(epsilon(history, budget.delta, DEVICE), history) for history in events]
    strict = max((guarantee.strict for guarantee in guarantees if guarantee.strict is not None), default=None)
    seen = max(filter(None, (_unsampled_epsilon(history, budget.delta) for history in events)), default=None)
    return replace(max(guarantees, key=lambda guarantee: guarantee.value), strict=strict, seen=seen)


def _unsampled_epsilon(events: Sequence[PoissonGaussian], delta: float) -> float | None:
    """Compute ε of a device that was asked in every round, against an observer who knows it; None without sampling."""
    if all(event.sampling_rate == 1 for event in events):
        return None
    return epsilon([replace(event, sampling_rate=1.0) for event in events], delta, DEVICE).value


def _maximal(histories: Iterable[Counter[PoissonGaussian]]) -> list[Counter[PoissonGaussian]]:
    """Drop histories that are contained in another one, since they can't cost more."""
    distinct = {frozenset(history.items()): history for history in histories}.values()
    return [history for history in distinct if not any(history != other and history <= other for other in distinct)]
