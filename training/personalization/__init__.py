"""Personalization methods: from the shared adapter and a few pictures to a personal adapter, on the device.

A method has two parts. `fit` runs after the rounds and makes the personal adapter, which never leaves the device.
`train_round` is for methods that also take part in the rounds, such as those that learn which directions people differ
in. Both are generators: they yield jobs and receive their results, so that the driver decides where the jobs run.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch

from common.errors import AntherError
from common.plugins import Registry
from models.lora.adapter import Adapter, Site, Sites
from training.jobs import Job, Result, TrainedAdapter, TrainJob, expect


class RoundTraining(NamedTuple):
    """Result of one round on a device."""

    trained: TrainedAdapter
    state: Adapter | None
    """State that the device keeps for its next round; None: nothing."""


class Personalization:
    """LoRA on top: the base class of all methods, and the simplest one.

    Attributes:
        in_rounds: whether values that a device fits to its own pictures enter the shared forward pass of a round. They
            are trained without noise, so such methods are refused with example-level privacy.
        elementwise: whether each number of the shared adapter keeps its meaning, so that only rules which average
            factors of one rank can be used.
        last_round_steps: local steps of the last round, if that belongs to the method: devices train B only, and the
            server calls `after_last_round`. None: the last round is like the others.
        passes_per_step: batches in an optimizer step after the rounds.
    """

    in_rounds = False
    elementwise = False
    last_round_steps: int | None = None
    passes_per_step = 1

    def steps_in_round(self, round: int) -> int:  # noqa: ARG002
        """Return the steps in a round beside those of the shared adapter.

        A step is a forward and backward pass of one batch, as everywhere that steps are counted.

        Args:
            round: number of the round, from 1.
        """
        return 0

    @property
    def steps_after(self) -> int:
        """Steps after the rounds beside those on the LoRA on top."""
        return 0

    def all_steps_after(self, personal: int) -> int:
        """Return all steps after the rounds, at most.

        Args:
            personal: optimizer steps on the personal adapter, `adapter.personal.steps`.
        """
        return personal * self.passes_per_step + self.steps_after

    @property
    def rank_in_round(self) -> int:
        """Rank of a further adapter that a device trains in a round before or after the shared one; 0: none."""
        return 0

    @property
    def drawing_steps(self) -> int:
        """Denoising steps for each caption after the rounds; the owner's limit of steps bounds them too."""
        return 0

    def message_rank(self, rank: int) -> int:
        """Return the rank in messages of a shared adapter of this rank."""
        return rank

    def trained_rank(self, message_rank: int) -> int:
        """Return the rank that a device trains at once, from that in messages."""
        return message_rank

    def largest_rank(self, message_rank: int) -> int:
        """Return the largest rank that a device trains at once in a round, from that in messages."""
        return max(self.trained_rank(message_rank), self.rank_in_round)

    def held_in_round(self, site: Site, rank: int) -> int:  # noqa: ARG002
        """Return the numbers that a device holds in a round beside those of training one adapter of the largest rank.

        Training an adapter holds it as received, as trained, its moments, and the sum of its gradients.

        Args:
            site: dimensions of a site.
            rank: rank of the shared adapter that the device trains.
        """
        return 0

    def personal_rank(self, rank: int, shared_rank: int) -> int:  # noqa: ARG002
        """Return the rank that a device trains at once after the rounds.

        Args:
            rank: the requested rank, `adapter.personal.rank`.
            shared_rank: rank of the shared adapter as it was received.
        """
        return rank

    def initial(self, shared: Adapter, seed: int) -> Adapter:  # noqa: ARG002
        """Return the adapter of the first round.

        Args:
            shared: A [r, in] and B [out, r] per site.
            seed: seed of random parts.
        """
        return shared

    def cleaned(self, shared: Adapter) -> Adapter:
        """Return the adapter without noise that the server added where this method needs zeros."""
        return shared

    def after_last_round(self, shared: Adapter, trained: Sequence[Adapter]) -> Adapter:
        """Return the adapter that devices personalize, if the last round belongs to the method.

        Args:
            shared: adapter before the round; A [r, in] and B [out, r] per site.
            trained: the same with the B that each device trained; at least one.
        """
        raise NotImplementedError

    def train_round(self, job: TrainJob, state: Adapter | None) -> Generator[Job, Result, RoundTraining]:
        """Train the shared adapter in a round.

        Args:
            job: training of all factors as without this method.
            state: state that the device kept after its last round.
        """
        return RoundTraining(expect(TrainedAdapter, (yield job)), state)

    def fit(self, job: TrainJob, shared: Adapter, captions: Sequence[str]) -> Generator[Job, Result, Adapter]:
        """Fit the personal adapter, which is added to the shared one.

        Args:
            job: training of a LoRA on top of the shared adapter, which is frozen.
            shared: the shared adapter as it was received.
            captions: captions of the training pictures.
        """
        del shared, captions
        return expect(TrainedAdapter, (yield job)).adapter


def steps_by_round(method: Personalization, *, rounds: int, shared: int) -> list[int]:
    """Return the steps of a device in each round, with those of its method.

    Args:
        method: method of personalization.
        rounds: number of rounds.
        shared: steps on the shared adapter in a round.
    """
    steps = [shared] * rounds
    if method.last_round_steps is not None:
        steps[-1] = method.last_round_steps
    return [count + method.steps_in_round(number) for number, count in enumerate(steps, start=1)]


def held_bytes(method: Personalization, sites: Sites, message_rank: int) -> int:
    """Return the bytes of `Personalization.held_in_round` at all sites of the adapter that a device receives.

    Args:
        method: method of personalization.
        sites: sites of the adapter.
        message_rank: rank of the adapter in messages.
    """
    rank = method.trained_rank(message_rank)
    return torch.float32.itemsize * sum(method.held_in_round(site, rank) for site in sites.values())


def total_steps(method: Personalization, *, rounds: int, shared: int, personal: int) -> int:
    """Return the steps of a device that takes part in all rounds and makes its personal adapter, at most.

    Args:
        method: method of personalization.
        rounds: number of rounds.
        shared: steps on the shared adapter in a round.
        personal: steps on the personal adapter after the rounds.
    """
    return sum(steps_by_round(method, rounds=rounds, shared=shared)) + method.all_steps_after(personal)


PERSONALIZATIONS: Registry[Any] = Registry("personalization", key="personalization", modules=__name__, on_device=True)
personalization = PERSONALIZATIONS.register


def build(name: str, options: Mapping[str, float]) -> Personalization:
    """Create a method from a message.

    Args:
        name: its name.
        options: arguments of its constructor; whole numbers are sent as floats.

    Raises:
        AntherError: it is not registered on this device, or an option is unknown or out of range.
    """
    method = PERSONALIZATIONS.lookup(name)
    hints = get_type_hints(method.__init__)
    if unknown := min(options.keys() - inspect.signature(method).parameters.keys(), default=None):
        raise AntherError(f"personalization.{unknown[:100]}: no option of {name}")
    if broken := next(
        (key for key, value in options.items() if hints[key] is int and not float(value).is_integer()), None
    ):
        raise AntherError(f"personalization.{broken}={options[broken]}: must be a whole number")
    values = {key: hints[key](value) for key, value in options.items()}
    try:
        built: Personalization = method(**values)
    except ValueError as error:
        raise AntherError(f"personalization.{error}") from error
    return built
