"""State that a device keeps from one round to the next, also as it was before, in case the last round is repeated."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor


class Residual(NamedTuple):
    """Quantization error of one round's change, by tensor name; added once to the next change (error feedback)."""

    compatibility_key: str  # a round uses the residual only if its key is equal
    round: int
    left: dict[str, Tensor]
    carried: dict[str, Tensor]  # the residual that this round used, in case the round is repeated


class ControlVariateState(NamedTuple):
    """A device's SCAFFOLD control variate, by the names of the tensors that it corrects."""

    compatibility_key: str  # see `Residual`
    round: int
    before: dict[str, Tensor]  # in case this round is repeated
    after: dict[str, Tensor]


class MethodState(NamedTuple):
    """Adapter that a method of personalization trains in the rounds and doesn't share, by tensor name."""

    compatibility_key: str  # see `Residual`
    round: int
    before: dict[str, Tensor]  # empty before the first round; in case this round is repeated
    after: dict[str, Tensor]


RoundState = TypeVar("RoundState", Residual, ControlVariateState, MethodState)


class LocalFactors(NamedTuple):
    """Factors B, `[out, rank]` by site, that a device trained in a run and does not share."""

    run: str
    promise: str  # privacy guarantee under which it was trained
    round: int
    after: dict[str, Tensor]
    before: dict[str, Tensor]  # in case this round is repeated
