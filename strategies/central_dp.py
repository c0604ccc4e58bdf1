"""A linear rule behind clip and noise: privacy per device, on a server that is trusted with single updates.

The rule itself sees one update only, the noised mean of the clipped ones: of a rule that is linear this is the same as
the noised mean of what it would make of them, and whatever it makes of it is made of something private.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.errors import AntherError
from models.lora.adapter import Adapter, Sites, rank, select_sites, split_rank
from models.lora.batched_lora import Layout
from models.lora.trainable import trained_layout
from privacy.accounting import ADD_OR_REMOVE_ONE, DEVICE, Guarantee, PoissonGaussian
from privacy.central import GaussianMechanism, clip_and_sum
from privacy.ledger.entries import MEASURE, TRAIN
from privacy.noise import NoiseSource
from strategies.aggregation import Aggregated, Aggregation
from strategies.round.metrics import CentralDPMetrics

log = logging.getLogger(__name__)


class BudgetExhausted(AntherError):  # noqa: N818 - the end of a budget is no error
    """No further round can be paid for: the run ends early, with what it has."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What one round is charged for, before anybody is asked."""

    run: str
    round: int
    mechanism: PoissonGaussian
    """A single step of it; with a sampling rate of 1, of those in `asked` alone."""
    clip: float
    """C, the sensitivity of the sum."""
    expected: float
    """m, which the noised sum is divided by."""
    adapter: str
    """SHA-256 of the adapter that is sent."""
    asked: tuple[str, ...] | None
    """Names of the devices that pay, all that were picked, whether or not they could be asked; None for all there are:
    a sample that amplifies is secret."""
    release: bool
    """False for simulated noise, which is charged all the same."""
    purpose: str = TRAIN
    unit: str = DEVICE
    relation: str = ADD_OR_REMOVE_ONE


@dataclass(frozen=True, kw_only=True)
class DeviceBudget:
    """What all rounds of a run may come to, for any one device."""

    epsilon: float
    delta: float
    beside: tuple[PoissonGaussian, ...] = ()
    """What else the run is going to release, paid from the same ε by every device."""
    participations: int | None = None
    """Rounds that one device may be asked in; None: the rounds are secret samples, and everybody pays for each."""


class ChargeLedger(Protocol):
    """Where charges are kept (`server.ledger`)."""

    def participations(self) -> Mapping[str, int]:
        """In how many rounds each device was picked, those that were broken off among them."""
        ...

    def reserve(self, charge: Charge, budget: DeviceBudget) -> Guarantee:
        """Charge for a round, durably; what the device that paid most has spent, and what `beside` will cost it.

        Raises Exhausted, with nothing written, if that is over the budget.
        """
        ...

    def release(self, run: str, round: int) -> None:
        """Note that a round's result is kept. It changes nothing of what is charged."""
        ...

    def anchor(self) -> Anchor:
        """Where the ledger stands, to be kept elsewhere."""
        ...

    def check(self, anchor: Anchor | None) -> None:
        """Raises AntherError unless the ledger holds all that it held at this anchor, unchanged."""
        ...


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """The first events of a ledger: their number, and the digest that stands for them."""

    events: int
    head: str


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A round that is charged for."""

    guarantee: Guarantee
    clip: float
    noise: NoiseSource


class CentralDP:
    """The server's side of `privacy=device`.

    Args:
        run: the name that charges are made under.
        mechanism: the noise and the divisor of a round.
        sampling_rate: q of a selection that amplifies; 1 for every other.
        clip: C of the first round.
        noise: the source for a round; `SecureNoise` unless the server's own configuration declares a test.
        frame: where only cores are trained, the factors around them: cores alone are clipped and noised.
    """

    def __init__(
        self,
        *,
        run: str,
        sites: Sites,
        mechanism: GaussianMechanism,
        sampling_rate: float,
        clip: float,
        budget: DeviceBudget,
        noise: Callable[[int], NoiseSource],
        ledger: ChargeLedger,
        lora_xs_bases: Adapter | None = None,
    ) -> None:
        self.mechanism, self.budget, self.ledger = mechanism, budget, ledger
        self.sampling_rate = sampling_rate
        self.clip = self._first = clip
        self._run, self._sites, self._lora_xs_bases, self._noise = run, sites, lora_xs_bases, noise
        self._open: _Open | None = None

    def resume(self, last: CentralDPMetrics | None) -> None:
        """Go on after this round: an adaptive clip continues where it stood."""
        self.clip = last.next_clip if last else self._first

    def eligible(self, names: Collection[str]) -> set[str]:
        """Those that may be asked once more.

        Under a secret sample everybody is: to leave somebody out would change the rate.

        Raises:
            Exhausted: there are devices, and none of them may.
        """
        most = self.budget.participations
        if most is None:
            return set(names)
        had = self.ledger.participations()
        found = {name for name in names if had.get(name, 0) < most}
        if names and not found:
            raise BudgetExhausted(f"every device was asked in {most} rounds, which is what its ε is solved for")
        return found

    def open(self, round: int, picked: Sequence[str], adapter: bytes) -> None:
        """Charge for a round, before anything of it leaves the server.

        Args:
            picked: who pays, asked or not: what a device tells of its moment would else decide when it is at its cap,
                and so who is asked in its place.

        Raises:
            Exhausted: the round would exceed the budget.
        """
        noise = self._noise(round)
        charge = Charge(
            run=self._run,
            round=round,
            mechanism=PoissonGaussian(
                noise_multiplier=self.mechanism.noise_multiplier, sampling_rate=self.sampling_rate, steps=1
            ),
            clip=self.clip,
            expected=self.mechanism.expected,
            adapter=hashlib.sha256(adapter).hexdigest(),
            asked=None if self.budget.participations is None else tuple(picked),
            release=noise.release,
        )
        self._open = _Open(guarantee=self.ledger.reserve(charge, self.budget), clip=self.clip, noise=noise)

    def charge_evaluation(
        self, round: int, adapter: bytes, mechanism: PoissonGaussian, *, clip: float, expected: float
    ) -> bool:
        """Charge everybody for measuring a round's adapter, before anybody is asked to; False if that is too much.

        Then the round is not measured, and stays what it is.

        Args:
            mechanism: one step of it, on the sum of the devices' gains.
            clip: bound on one device's gain.
            expected: what the noised sum is divided by.
        """
        charge = Charge(
            run=self._run,
            round=round,
            mechanism=mechanism,
            clip=clip,
            expected=expected,
            adapter=hashlib.sha256(adapter).hexdigest(),
            asked=None,
            release=self._noise(round).release,
            purpose=MEASURE,
        )
        try:
            self.ledger.reserve(charge, self.budget)
        except BudgetExhausted as over:
            log.warning("round %d is not measured: %s", round, over)
            return False
        return True

    def close(
        self, rule: Aggregation, current: Adapter, trained: Iterable[Adapter], *, round: int
    ) -> tuple[Aggregated, CentralDPMetrics]:
        """The next adapter, noised whatever came back, also if nothing did: to keep the old one would tell so.

        What is clipped is what was decoded, in whichever precision it came. A device may carry what rounding left of
        one round's change into the next: that is of its own data still, and the clip holds it, so each round's sum
        moves by C at most whatever it remembers. The coins of a sampled round are fresh, which is all that
        amplification asks: what it remembers of earlier ones decides what is clipped, never whether it is there.

        A site that a device was not asked to train is a change of 0 and dilutes its mean: the divisor is the public
        constant, at every site, whoever trained it. Which sites those are follows from the plan, which follows from
        nothing private.

        Raises:
            ValueError: the round was not charged for, or has been released.
        """
        if self._open is None:
            raise ValueError("a round is charged for before it is released, and released once")
        opened, self._open = self._open, None
        layout = trained_layout(self._sites, rank(current), rule.trains(round), self._lora_xs_bases or current)
        clipped = clip_and_sum(changes(layout, current, trained), opened.clip, layout.size)
        released = self.mechanism.release(clipped, opened.noise)
        moved = layout.unpack((layout.pack(current).double() + released.mean).float(), current)
        aggregated = rule.aggregate(current, [(moved, 1.0)], round=round)
        facts = CentralDPMetrics(
            guarantee=opened.guarantee,
            clip=opened.clip,
            next_clip=released.next_clip,
            deviation=released.noise_stddev,
            snr=released.snr,
            dropped=clipped.dropped,
            release=opened.noise.release,
        )
        diagnostics = {"snr": facts.snr, "clip": facts.clip, "noise": facts.deviation}
        return Aggregated(aggregated.adapter, diagnostics), facts


def changes(layout: Layout, current: Adapter, trained: Iterable[Adapter]) -> Iterator[Tensor]:
    """Each device's change of what is trained [D], float64; directions and sites that it did not train are 0."""
    for adapter in trained:
        start, _ = split_rank(select_sites(current, adapter), rank(adapter))
        yield layout.pack(adapter).double() - layout.pack(start).double()
