"""The server's part of a round: from the updates of the devices to the next adapter.

`ServerUpdate` composes an aggregation rule with what wraps it: the noise of device-level privacy before it, the server
optimizer and the quantization residual after it, and the bound on the norm that devices enforce.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from models.lora.adapter import Adapter, rank
from models.lora.norm_bound import norm_violation
from models.lora.trainable import from_trained_tensors, trained_layout, trained_tensors
from privacy.snr import signal_to_spread
from strategies.aggregation import Aggregated, Aggregation, RankAware
from strategies.central_dp import CentralDP, changes
from strategies.download import AdapterFormat, add_residual
from strategies.last_round import LastRound
from strategies.round.metrics import CentralDPMetrics
from strategies.round.request import RoundStart
from strategies.round.updates import RoundUpdates
from strategies.server_optimizers import ServerOptimizer, StrategyState
from training.personalization import Personalization

log = logging.getLogger(__name__)


class NextAdapter(NamedTuple):
    """Result of `ServerUpdate.apply`."""

    aggregated: Aggregated | None
    """None: the round keeps the current adapter."""
    memory: StrategyState
    central: CentralDPMetrics | None
    """None without server noise."""


@dataclass(frozen=True, kw_only=True)
class ServerUpdate:
    """Compute the next adapter from the updates of a round."""

    aggregation: Aggregation
    server_optimizer: ServerOptimizer | None = None
    """Converts a round's mean into a step; None: the mean is the next adapter."""
    central_dp: CentralDP | None = None
    """Clips and noises updates on the server; None: updates are aggregated as they are."""
    personalization: Personalization = field(default_factory=Personalization)
    """Method that the shared adapter is made for."""
    quorum: int = 1
    """Number of accepted replies without which a round keeps the adapter."""

    def steps(self, round: int) -> int | None:
        """Return the local steps of a round that has its own number of them; None: those of the plan."""
        return self.aggregation.steps(round) if isinstance(self.aggregation, LastRound) else None

    def apply(
        self,
        start: RoundStart,
        current: Adapter,
        updates: RoundUpdates,
        *,
        residual: Mapping[str, Tensor],
        format: AdapterFormat,
        with_snr: bool,
    ) -> NextAdapter:
        """Compute the next adapter, its diagnostics, and the metrics of the server's noise.

        Args:
            start: state before the round.
            current: its adapter as decoded by devices.
            updates: accepted updates.
            residual: quantization residual of `current`.
            format: sites and fixed factors of the adapter.
            with_snr: also estimate the signal-to-noise ratio of the updates, which devices have noised.
        """
        combined = self._combine(start.number, current, updates)
        if combined is None:
            return NextAdapter(None, start.memory, None)
        mean, central = combined
        aggregated, memory = self._take_step(start, current, mean, residual=residual, format=format)
        aggregated = aggregated._replace(adapter=self.personalization.cleaned(aggregated.adapter))
        # Each update was valid, and a private release does not depend on it: the aggregate may still exceed the bound.
        if violation := norm_violation(aggregated.adapter):
            log.warning(
                "round %d: keeping the adapter, since devices would refuse the next: %s", start.number, violation
            )
            return NextAdapter(None, start.memory, central)
        # Rebased updates of older adapters may be stacked factors of a larger rank, without a comparable change.
        if central or not with_snr or any(rank(adapter) > rank(current) for adapter, _ in updates.adapters):
            return NextAdapter(aggregated, memory, central)
        trains = self.aggregation.trains(start.number)
        layout = trained_layout(format.sites, rank(current), trains, format.lora_xs_bases or current)
        snr = signal_to_spread(changes(layout, current, (adapter for adapter, _ in updates.adapters)))
        diagnostics = aggregated.diagnostics | ({} if snr is None else {"snr": snr})
        return NextAdapter(aggregated._replace(diagnostics=diagnostics), memory, central)

    def _combine(
        self, number: int, current: Adapter, updates: RoundUpdates
    ) -> tuple[Aggregated, CentralDPMetrics | None] | None:
        """Aggregate the updates; None if there are too few. With central DP, they are noised however few there are."""
        if self.central_dp:
            trained = (adapter for adapter, _ in updates.adapters)
            return self.central_dp.privatize(self.aggregation, current, trained, round=number)
        if len(updates) < self.quorum:
            return None
        rule = self.aggregation
        if isinstance(rule, RankAware):
            rule = rule.with_ranks({update.rank for update in updates.updates})
        return rule.aggregate(current, updates.adapters, round=number), None

    def _take_step(
        self,
        start: RoundStart,
        current: Adapter,
        aggregated: Aggregated,
        *,
        residual: Mapping[str, Tensor],
        format: AdapterFormat,
    ) -> tuple[Aggregated, StrategyState]:
        """Apply the server optimizer and add the quantization residual; arguments as in `apply`."""
        if self.server_optimizer is None:
            return aggregated._replace(adapter=add_residual(aggregated.adapter, residual)), start.memory
        trains, mean, bases = self.aggregation.trains(start.number), aggregated.adapter, format.lora_xs_bases
        before, after = (trained_tensors(adapter, trains, bases) for adapter in (current, mean))
        tensors, state = self.server_optimizer.step(before, after, start.memory)
        stepped = add_residual(from_trained_tensors(tensors, trains, mean, bases), residual)
        return aggregated._replace(adapter=stepped), {**start.memory, **state}
