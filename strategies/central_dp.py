"""Device-level privacy: clip and noise the updates on a server that is trusted with each of them.

The rule is applied once, to the noised mean of the clipped updates. For a linear rule this equals noising its output;
everything after the noise is post-processing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.errors import AntherError
from models.lora.adapter import Adapter, Sites, first_directions, rank, select_sites
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
    """Raised if the budget does not cover another round. The run then ends early, with its current adapter."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """Charge for one round, made before any device is contacted."""

    run: str
    round: int
    mechanism: PoissonGaussian
    """Mechanism of one step. With a sampling rate of 1, only the devices in `asked` are charged."""
    clip: float
    """C, the sensitivity of the sum."""
    expected: float
    """m, the divisor of the noised sum."""
    adapter: str
    """SHA-256 of the adapter that is sent."""
    asked: tuple[str, ...] | None
    """Names of the charged devices: all selected ones, whether or not they can be contacted. None: every device is
    charged, since the sample is secret and amplifies privacy."""
    release: bool
    """Whether the noised result is a private release. False for simulated noise, which is charged too."""
    purpose: str = TRAIN
    unit: str = DEVICE
    relation: str = ADD_OR_REMOVE_ONE


@dataclass(frozen=True, kw_only=True)
class DeviceBudget:
    """Limit of each device for all rounds of a run."""

    epsilon: float
    delta: float
    other_releases: tuple[PoissonGaussian, ...] = ()
    """Further planned releases of the run, charged to every device under the same ε."""
    participations: int | None = None
    """Number of rounds that one device may be selected in; None: samples are secret, and every device is charged for
    every round."""


class ChargeLedger(Protocol):
    """Storage of charges (`server.ledger`)."""

    def participations(self) -> Mapping[str, int]:
        """Return the number of rounds that each device was selected in, including aborted ones."""
        ...

    def reserve(self, charge: Charge, budget: DeviceBudget) -> Guarantee:
        """Record the charge for a round durably.

        Args:
            charge: charge of the round.
            budget: limit of the run.

        Returns:
            The largest ε that a device has spent, including the planned `other_releases`.

        Raises:
            BudgetExhausted: the charge exceeds the budget; nothing is written.
        """
        ...

    def release(self, run: str, round: int) -> None:
        """Record that the result of a round is stored. This does not change any charge."""
        ...

    def anchor(self) -> Anchor:
        """Return the current state of the ledger, to be stored elsewhere."""
        ...

    def check(self, anchor: Anchor | None) -> None:
        """Raise AntherError unless the ledger still has all events up to this anchor, unchanged."""
        ...


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Number of the first events of a ledger, and their digest."""

    events: int
    head: str


@dataclass(frozen=True, kw_only=True)
class _ChargedRound:
    """Round that has been charged and not released yet."""

    guarantee: Guarantee
    clip: float
    noise: NoiseSource


class CentralDP:
    """Server side of `privacy=device`.

    Args:
        run: name under which charges are made.
        sites: sites of the adapter.
        mechanism: noise and divisor of a round.
        sampling_rate: q of a selection that amplifies privacy; 1 for any other selection.
        clip: C of the first round.
        budget: limit for each device.
        noise: function from a round's number to its noise source, which is `SecureNoise` unless the server's own
            configuration is in test mode.
        ledger: storage of charges.
        lora_xs_bases: if only cores are trained, the fixed factors around them. Only the cores are clipped and noised.
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
        self.clip = self._initial_clip = clip
        self._run, self._sites, self._lora_xs_bases, self._noise = run, sites, lora_xs_bases, noise
        self._charged: _ChargedRound | None = None

    def resume(self, last: CentralDPMetrics | None) -> None:
        """Continue an adaptive clip after this round."""
        self.clip = last.next_clip if last else self._initial_clip

    def eligible(self, names: Collection[str]) -> set[str]:
        """Return the devices that may be selected in another round.

        With a secret sample these are all devices: leaving one out would change the sampling rate.

        Raises:
            BudgetExhausted: there are devices, and none of them is eligible.
        """
        limit = self.budget.participations
        if limit is None:
            return set(names)
        counts = self.ledger.participations()
        eligible = {name for name in names if counts.get(name, 0) < limit}
        if names and not eligible:
            raise BudgetExhausted(f"every device was selected in {limit} rounds, the number that its ε is solved for")
        return eligible

    def charge_round(self, round: int, selected: Sequence[str], adapter: bytes) -> None:
        """Charge for a round before any of its messages leaves the server.

        Args:
            round: number of the round.
            selected: devices to charge, contacted or not. If only contacted devices were charged, the transient state
                of a device would determine when it reaches its limit, and so which device is selected in its place.
            adapter: payload that is sent.

        Raises:
            BudgetExhausted: the round would exceed the budget.
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
            asked=None if self.budget.participations is None else tuple(selected),
            release=noise.release,
        )
        self._charged = _ChargedRound(guarantee=self.ledger.reserve(charge, self.budget), clip=self.clip, noise=noise)

    def charge_evaluation(
        self, round: int, adapter: bytes, mechanism: PoissonGaussian, *, clip: float, expected: float
    ) -> bool:
        """Charge every device for the evaluation of a round's adapter, before any device is contacted.

        Args:
            round: number of the round.
            adapter: payload that is evaluated.
            mechanism: one step, on the sum of the devices' gains.
            clip: bound on the gain of one device.
            expected: divisor of the noised sum.

        Returns:
            False if the budget does not cover the evaluation, which is then skipped; the round is otherwise unaffected.
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
        except BudgetExhausted as error:
            log.warning("round %d is not evaluated: %s", round, error)
            return False
        return True

    def privatize(
        self, rule: Aggregation, current: Adapter, trained: Iterable[Adapter], *, round: int
    ) -> tuple[Aggregated, CentralDPMetrics]:
        """Compute the next adapter from the noised mean of the clipped updates.

        Noise is added even if no device replied, since keeping the old adapter would reveal that. Decoded updates are
        clipped, in whatever precision they were sent. A device may add the quantization residual of one round to its
        next change: the residual depends only on its own data, and the clip covers it, so each round's sum moves by at
        most C, regardless of the state that a device keeps between rounds. The coin flips of a sampled round are fresh,
        which is all that amplification requires: earlier rounds may determine the clipped values, but not whether the
        device takes part.

        A site that a device was not asked to train counts as a change of 0, which dilutes its mean: the divisor is the
        public constant at every site. The plan determines these sites, and it does not depend on private data.

        Args:
            rule: linear aggregation rule.
            current: adapter that the round started from.
            trained: updates of the devices.
            round: number of the round.

        Raises:
            ValueError: the round was not charged for, or has been released.
        """
        if self._charged is None:
            raise ValueError("charge_round must be called before a round is released, and each round is released once")
        charged, self._charged = self._charged, None
        layout = trained_layout(self._sites, rank(current), rule.trains(round), self._lora_xs_bases or current)
        clipped = clip_and_sum(changes(layout, current, trained), charged.clip, layout.size)
        released = self.mechanism.release(clipped, charged.noise)
        moved = layout.unpack((layout.pack(current).double() + released.mean).float(), current)
        aggregated = rule.aggregate(current, [(moved, 1.0)], round=round)
        metrics = CentralDPMetrics(
            guarantee=charged.guarantee,
            clip=charged.clip,
            next_clip=released.next_clip,
            deviation=released.noise_stddev,
            snr=released.snr,
            dropped=clipped.dropped,
            release=charged.noise.release,
        )
        diagnostics = {"snr": metrics.snr, "clip": metrics.clip, "noise": metrics.deviation}
        return Aggregated(aggregated.adapter, diagnostics), metrics


def changes(layout: Layout, current: Adapter, trained: Iterable[Adapter]) -> Iterator[Tensor]:
    """Yield each device's change of the trained tensors; 0 for directions and sites it did not train.

    Args:
        layout: layout of the trained tensors, D numbers.
        current: adapter that the round started from, A `[r, in]` and B `[out, r]` by site.
        trained: adapter of each device, of rank r or less.

    Yields:
        Change of one device, float64 `[D]`.
    """
    for adapter in trained:
        start = first_directions(select_sites(current, adapter), rank(adapter))
        yield layout.pack(adapter).double() - layout.pack(start).double()
