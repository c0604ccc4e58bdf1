"""Server optimisers: a round's mean is a step in a direction, and not yet the next adapter.

FedAvgM (Hsu, Qi & Brown, 2019, arXiv:1909.06335, §3.1) and FedAdam and FedYogi (Reddi et al., 2021, arXiv:2003.00295,
algorithm 2). The pseudo-gradient of a round is Δ_t = aggregated − x_t, for each number of what is trained: the factors,
or the cores of a plan that trains those. A sum of such changes over rounds means something where a direction of the
adapter stays the same direction from round to round: with a mean of factors it does, and after `exact`, which turns its
factors towards the last round's before Δ_t is taken. What is fresh or turned in each round has no Δ.

An optimiser sees what a round released and what it remembers of earlier releases, and no single update: whatever the
round promises about a picture or a device, it promises of the step too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""What is trained of an adapter, by the names that it travels under."""

StrategyState = Mapping[str, Tensors]
"""The moments, by name, of every tensor: float32, a part of the run's state."""

_MEAN, _SQUARE = "mean", "square"


class Step(NamedTuple):
    """The next x, and what is to be remembered of it."""

    tensors: dict[str, Tensor]
    memory: StrategyState


class ServerOptimizer(Protocol):
    """A pure rule: the same round after the same memory gives the same step."""

    sensitivity: PostProcessing

    def step(self, current: Tensors, aggregated: Tensors, memory: StrategyState) -> Step:
        """From the adapter of a round, and what the round made of it.

        A tensor that the round left as it was, to the last bit, was trained by nobody: it stays, and its moments with
        it. Directions that are new begin with B = 0 and moments of 0; those that are gone take theirs along.
        """
        ...


class PostProcessing(NamedTuple):
    """What an optimiser declares of itself; under privacy one that declares nothing is refused."""

    reason: str


_AFTER = PostProcessing(reason="a step is made of what rounds released and of nothing else")


class FedAvgM:
    """m_t = β m_{t−1} + Δ_t and x_{t+1} = x_t + η m_t; with η = 1 and β = 0 the mean itself, to the last bit.

    Args:
        rate: η.
        momentum: β.
    """

    sensitivity = _AFTER

    def __init__(self, *, rate: float, momentum: float) -> None:
        _check(rate, momentum)
        self._rate, self._momentum = rate, momentum

    def step(self, current: Tensors, aggregated: Tensors, memory: StrategyState) -> Step:
        """As `ServerOptimizer.step`."""
        found, means = dict(aggregated), dict(memory.get(_MEAN, {}))
        for name, after in aggregated.items():
            before = _fitted(name, current[name], after)
            if (change := after.double() - before).any():
                mean = self._momentum * _moment(means.get(name), after) + change
                means[name] = kept(mean)
                # x + η m, written so that nothing is lost where η m = Δ.
                found[name] = (after.double() + (self._rate * mean - change)).float()
        return Step(found, {_MEAN: means})


class FedOpt:
    """FedAdam and FedYogi: m_t = β₁ m_{t−1} + (1 − β₁) Δ_t and x_{t+1} = x_t + η m_t / (√v_t + τ), with v_{−1} = τ².

    Of FedAdam v_t = β₂ v_{t−1} + (1 − β₂) Δ_t²; of FedYogi v_t = v_{t−1} − (1 − β₂) Δ_t² sign(v_{t−1} − Δ_t²), which
    forgets a large change less quickly. Neither corrects the moments' bias, as in the paper.

    Args:
        rate: η.
        momentum: β₁.
        second: β₂.
        tau: τ, the smallest change that still counts as one.
        yogi: whose v_t.
    """

    sensitivity = _AFTER

    def __init__(self, *, rate: float, momentum: float, second: float, tau: float, yogi: bool) -> None:
        _check(rate, momentum)
        if not 0 <= second < 1:
            raise ValueError(f"{second=}: must be 0 or more, and under 1")
        if not tau > 0:
            raise ValueError(f"{tau=}: must be over 0")
        self._rate, self._momentum, self._second, self._tau, self._yogi = rate, momentum, second, tau, yogi

    def step(self, current: Tensors, aggregated: Tensors, memory: StrategyState) -> Step:
        """As `ServerOptimizer.step`."""
        found = dict(aggregated)
        means, squares = dict(memory.get(_MEAN, {})), dict(memory.get(_SQUARE, {}))
        for name, after in aggregated.items():
            before = _fitted(name, current[name], after)
            if (change := after.double() - before).any():
                mean = self._momentum * _moment(means.get(name), after) + (1 - self._momentum) * change
                square = self._squared(_moment(squares.get(name), after, self._tau**2), change.square())
                means[name], squares[name] = kept(mean), kept(square)
                found[name] = (before + self._rate * mean / (square.sqrt() + self._tau)).float()
        return Step(found, {_MEAN: means, _SQUARE: squares})

    def _squared(self, v: Tensor, square: Tensor) -> Tensor:
        """v_t, of v_{t−1} and Δ_t²."""
        if self._yogi:
            return v - (1 - self._second) * square * (v - square).sign()
        return self._second * v + (1 - self._second) * square


def _check(rate: float, momentum: float) -> None:
    if not rate > 0:
        raise ValueError(f"{rate=}: must be over 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"{momentum=}: must be 0 or more, and under 1")


def _fitted(name: str, before: Tensor, after: Tensor) -> Tensor:
    """Where a tensor stood, at the rank of what came of it: a new direction is that of its A from the start, and had
    B = 0 until now.
    """
    return _overlaid(before, after.double() if name.endswith(".lora_A") else torch.zeros_like(after).double())


def _moment(kept: Tensor | None, like: Tensor, fresh: float = 0.0) -> Tensor:
    """A moment at the rank of what it is of, float64; `fresh` where there was none."""
    empty = torch.full_like(like, fresh, dtype=torch.float64)
    return empty if kept is None else _overlaid(kept, empty)


def _overlaid(part: Tensor, whole: Tensor) -> Tensor:
    """`whole` with `part` in its place as far as both go: ranks grow, and shrink, at the end."""
    there = tuple(slice(min(sizes)) for sizes in zip(part.shape, whole.shape, strict=True))
    found = whole.clone()
    found[there] = part[there].double()
    return found


def kept(moment: Tensor) -> Tensor:
    """Float32 without subnormal numbers, as a checkpoint gives it back: a run goes on with the same, killed or not."""
    found = moment.float()
    return found.masked_fill_(found.abs() < torch.finfo(torch.float32).tiny, 0.0)
