"""Server optimizers: take a step in the direction of a round's mean.

FedAvgM (Hsu, Qi & Brown, 2019, arXiv:1909.06335, §3.1), FedAdam and FedYogi (Reddi et al., 2021, arXiv:2003.00295,
algorithm 2). The pseudo-gradient of a round is Δ_t = aggregated − x_t, for each number that is trained: the factors, or
the cores if the plan trains cores. A sum of these changes over rounds is meaningful only if a direction of the adapter
stays the same direction from round to round. This holds for a mean of factors, and for `exact`, which rotates its
factors towards those of the previous round before Δ_t is computed. Rules that create or rotate factors in every round
have no Δ.

The inputs of an optimizer are the release of a round and its state from earlier releases, but no single update. The
privacy guarantee of the round therefore holds for the step too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from common.plugins import Registry
from common.subnormals import without_subnormals

OPTIMIZERS: Registry[Any] = Registry("server_optimizer", key="server_optimizer", modules=__name__)
server_optimizer = OPTIMIZERS.register

Tensors = Mapping[str, Tensor]
"""Trained tensors of an adapter, by their protocol names."""

StrategyState = Mapping[str, Tensors]
"""Float32 tensors that a strategy keeps between rounds, by part (e.g. a moment) and name. Stored in checkpoints."""

_MEAN, _SQUARE = "mean", "square"  # parts of the strategy state; stored, don't change


class OptimizerStep(NamedTuple):
    """Next x, and the state after the step."""

    tensors: dict[str, Tensor]
    state: StrategyState


class ServerOptimizer(Protocol):
    """Pure update rule: the same round and state give the same step."""

    sensitivity: PostProcessing

    def step(self, current: Tensors, aggregated: Tensors, state: StrategyState) -> OptimizerStep:
        """Compute the next adapter.

        A tensor that is bitwise unchanged by the round was not trained: it and its moments stay unchanged. New
        directions start with B = 0 and zero moments; the moments of removed directions are dropped.

        Args:
            current: tensors that the round started from.
            aggregated: tensors after aggregation, possibly of another rank.
            state: strategy state after the previous round.
        """
        ...


class PostProcessing(NamedTuple):
    """Sensitivity declaration of an optimizer. An optimizer without one is refused under privacy."""

    reason: str


_RELEASES_ONLY = PostProcessing(reason="a step is a function of released aggregates only")


@server_optimizer("none")
class NoOptimizer:
    """The mean of a round is the next adapter."""

    sensitivity = PostProcessing(reason="the release of a round is the next adapter")


@server_optimizer("fedavgm")
class FedAvgM:
    """m_t = β m_{t−1} + Δ_t and x_{t+1} = x_t + η m_t; with η = 1 and β = 0 exactly the mean (bitwise).

    Args:
        lr: η.
        momentum: β.
    """

    sensitivity = _RELEASES_ONLY

    def __init__(self, *, lr: float = 1.0, momentum: float = 0.9) -> None:
        _check(lr, momentum)
        self._lr, self._momentum = lr, momentum

    def step(self, current: Tensors, aggregated: Tensors, state: StrategyState) -> OptimizerStep:
        """See `ServerOptimizer.step`."""
        tensors, means = dict(aggregated), dict(state.get(_MEAN, {}))
        for name, after in aggregated.items():
            before = _at_rank_of(name, current[name], after)
            if (change := after.double() - before).any():
                mean = self._momentum * _moment(means.get(name), after) + change
                means[name] = as_stored(mean)
                # x + η m, in a form without rounding error if η m = Δ.
                tensors[name] = (after.double() + (self._lr * mean - change)).float()
        return OptimizerStep(tensors, {_MEAN: means})


@server_optimizer("fedyogi", yogi=True)
@server_optimizer("fedadam", yogi=False)
class FedOpt:
    """FedAdam and FedYogi: m_t = β₁ m_{t−1} + (1 − β₁) Δ_t and x_{t+1} = x_t + η m_t / (√v_t + τ), with v_{−1} = τ².

    FedAdam: v_t = β₂ v_{t−1} + (1 − β₂) Δ_t². FedYogi: v_t = v_{t−1} − (1 − β₂) Δ_t² sign(v_{t−1} − Δ_t²), which
    forgets a large change more slowly. As in the paper, there is no bias correction of the moments.

    Args:
        lr: η.
        momentum: β₁.
        beta2: β₂.
        tau: τ, the scale below which changes count little.
        yogi: use v_t of FedYogi.
    """

    sensitivity = _RELEASES_ONLY

    def __init__(
        self, *, lr: float = 0.003, momentum: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, yogi: bool
    ) -> None:
        _check(lr, momentum)
        if not 0 <= beta2 < 1:
            raise ValueError(f"{beta2=}: must be 0 or more, and under 1")
        if not tau > 0:
            raise ValueError(f"{tau=}: must be over 0")
        self._lr, self._momentum, self._beta2, self._tau, self._yogi = lr, momentum, beta2, tau, yogi

    def step(self, current: Tensors, aggregated: Tensors, state: StrategyState) -> OptimizerStep:
        """See `ServerOptimizer.step`."""
        tensors = dict(aggregated)
        means, squares = dict(state.get(_MEAN, {})), dict(state.get(_SQUARE, {}))
        for name, after in aggregated.items():
            before = _at_rank_of(name, current[name], after)
            if (change := after.double() - before).any():
                mean = self._momentum * _moment(means.get(name), after) + (1 - self._momentum) * change
                square = self._squared(_moment(squares.get(name), after, self._tau**2), change.square())
                means[name], squares[name] = as_stored(mean), as_stored(square)
                tensors[name] = (before + self._lr * mean / (square.sqrt() + self._tau)).float()
        return OptimizerStep(tensors, {_MEAN: means, _SQUARE: squares})

    def _squared(self, v: Tensor, square: Tensor) -> Tensor:
        """Compute v_t from v_{t−1} and Δ_t²."""
        if self._yogi:
            return v - (1 - self._beta2) * square * (v - square).sign()
        return self._beta2 * v + (1 - self._beta2) * square


def _check(lr: float, momentum: float) -> None:
    if not lr > 0:
        raise ValueError(f"{lr=}: must be over 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"{momentum=}: must be 0 or more, and under 1")


def _at_rank_of(name: str, before: Tensor, after: Tensor) -> Tensor:
    """Resize a tensor to the rank that it has after the round, float64.

    A new direction is treated as if it had always existed, with the A of `after` and B = 0.
    """
    if before.shape == after.shape:
        return before.double()
    return _overlaid(before, after.double() if name.endswith(".lora_A") else torch.zeros_like(after).double())


def _moment(stored: Tensor | None, like: Tensor, initial: float = 0.0) -> Tensor:
    """Resize a stored moment to the shape of `like`, float64, filled with `initial`."""
    if stored is not None and stored.shape == like.shape:
        return stored.double()
    empty = torch.full_like(like, initial, dtype=torch.float64)
    return empty if stored is None else _overlaid(stored, empty)


def _overlaid(part: Tensor, whole: Tensor) -> Tensor:
    """Copy the common leading block of `part` into a copy of `whole`: ranks grow and shrink at the end."""
    block = tuple(slice(min(sizes)) for sizes in zip(part.shape, whole.shape, strict=True))
    result = whole.clone()
    result[block] = part[block].double()
    return result


def as_stored(moment: Tensor) -> Tensor:
    """Convert to float32 without subnormal numbers, as a checkpoint stores it, so that a resumed run is identical."""
    return without_subnormals(moment.float())
