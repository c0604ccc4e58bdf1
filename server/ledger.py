"""What a run has promised its devices, kept beside its checkpoints: `ledger.jsonl`, reserved → released.

A hash-chained journal that only grows. A round is charged when it is reserved, before a message leaves, and never
refunded: one that was broken off is run again under a second reservation, and both are paid for. Each checkpoint names
the events that were there (`Anchor`), so that a ledger that is missing, shortened or edited is told from a new one.

It is the trusted server's own, as are the checkpoints. Where no sample is secret it holds who was asked; of a secret
sample it holds nothing. Claimed: accidents, rollback and careless edits are found; not an operator who forges it all.
One run has one ledger: what several runs promise the same device adds up, and is for whoever starts them to add.
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
    """The ledger of one run, in its folder.

    Every method reads the journal again under its lock.

    Raises:
        AntherError: the journal was edited, or is damaged other than by a torn last line.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def charges(self) -> list[Charge]:
        """Every reservation, in the order made."""
        with self._storage.journal(JOURNAL) as journal:
            return list(self._charges(journal.lines))

    def participations(self) -> Mapping[str, int]:
        """In how many rounds each device was picked to train, those that were broken off among them."""
        return Counter(name for charge in self.charges() if charge.purpose == TRAIN for name in charge.asked or ())

    def reserve(self, charge: Charge, budget: DeviceBudget) -> Guarantee:
        """Charge for a round; what the device that paid most has spent, with all that `budget.beside` will cost it.

        Raises:
            Exhausted: the round would exceed the budget; nothing was written.
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
        """Note, once, that a round's adapter is in a checkpoint. It changes nothing of what is charged."""
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
        """Where the ledger stands, to be kept with a checkpoint."""
        with self._storage.journal(JOURNAL) as journal:
            return Anchor(events=len(journal.lines), head=hash_chain.chain_head(journal.lines))

    def check(self, anchor: Anchor | None) -> None:
        """Raises AntherError unless the ledger still begins with what it held at this anchor."""
        with self._storage.journal(JOURNAL) as journal:
            self._events(journal.lines)
            if anchor is None or hash_chain.starts_with(journal.lines, anchor.events, anchor.head):
                return
            where = self._storage.where(JOURNAL)
            found = len(journal.lines)
        state = (
            f"holds {found} of the {anchor.events} events that the checkpoint names"
            if found < anchor.events
            else "is not the one that the checkpoint names"
        )
        raise AntherError(
            f"{where}: {state}: without it nobody knows what was promised; restore it from a backup, or begin a new "
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
    """ε of the device that paid most, with what is left to measure of `budget.beside`.

    Without a secret sample a device pays for the rounds that it was asked in. With one every device pays for every
    round: that it may not have been asked is what the sampling rate accounts for. Beside it stands what it comes to for
    who sees who is asked.
    """
    everybody: Counter[PoissonGaussian] = Counter()
    planned = Counter({replace(event, steps=1): event.steps for event in budget.beside})
    of_device: dict[str, Counter[PoissonGaussian]] = {}
    for charge in charges:
        if charge.purpose != TRAIN:
            planned[charge.mechanism] -= 1
        if charge.asked is None:
            everybody[charge.mechanism] += 1
        for name in charge.asked or ():
            of_device.setdefault(name, Counter())[charge.mechanism] += 1
    histories = [Counter[PoissonGaussian](), *of_device.values()]
    everybody += +planned  # only what is left of them
    events = [list((everybody + history).elements()) for history in _longest(histories)]
    found = [with_strict(epsilon(one, budget.delta, DEVICE), one) for one in events]
    strict = max((guarantee.strict for guarantee in found if guarantee.strict is not None), default=None)
    seen = max(filter(None, (_seen(one, budget.delta) for one in events)), default=None)
    return replace(max(found, key=lambda guarantee: guarantee.value), strict=strict, seen=seen)


def _seen(events: Sequence[PoissonGaussian], delta: float) -> float | None:
    """ε of a device that was asked in every round, for who sees that; None if it was no secret."""
    if all(event.sampling_rate == 1 for event in events):
        return None
    return epsilon([replace(event, sampling_rate=1.0) for event in events], delta, DEVICE).value


def _longest(histories: Iterable[Counter[PoissonGaussian]]) -> list[Counter[PoissonGaussian]]:
    """Those that no other one contains: the others can't have cost more."""
    distinct = {frozenset(history.items()): history for history in histories}.values()
    return [one for one in distinct if not any(one != other and one <= other for other in distinct)]
