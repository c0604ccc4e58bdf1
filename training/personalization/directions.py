"""Coefficients over directions that the federation learns.

The shared adapter B A is accompanied by K directions D_k: a person's adapter is (B + Σ_k c_k D_k) A with K coefficients
of their own (`models.lora.directions`). In each round a device

1. fits its coefficients, from zero, to a part of its pictures, the *support*;
2. takes gradient steps on A and B + Σ_k c_k D_k with the other pictures, the *query*, so that directions are learned
   that carry over from some pictures of a person to others;
3. sends the changes of A and B, and c ⊗ ΔB as the change of the directions.

All three are averaged. This is first-order meta-learning of an adaptation in K numbers (CAVIA: Zintgraf et al., 2019,
arXiv:1810.03642; first order as in Finn et al., 2017, arXiv:1703.03400, §5.2). A device keeps nothing between rounds,
so a newcomer personalizes exactly as a member does: coefficients, then a LoRA on top.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace

import torch

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors, Site, concatenate
from models.lora.directions import (
    Directions,
    divide,
    extend,
    init_directions,
    outer_change,
    personal_adapter,
    shift_directions,
)
from training.jobs import Examples, Job, Result, TrainedAdapter, TrainJob, expect
from training.personalization import Personalization, RoundTraining, personalization


@personalization("directions")
class LearnedDirections(Personalization):
    """Coefficients over directions learned in the rounds, then a LoRA on top.

    Args:
        number: K, the number of directions.
        steps: optimizer steps on the coefficients after the rounds, at most.
        round_steps: optimizer steps on them in each round.
        lr: learning rate of the coefficients after the rounds.
        round_lr: their learning rate in a round.
        prior: weight of ‖c‖²/2 in their loss: coefficients are expected to be of the order of 1.
        support: fraction of the pictures that coefficients are fitted to in a round.
        warmup: first rounds, in which only the shared adapter is trained.
        scale: standard deviation of a direction's entries before the first round.
    """

    in_rounds = True
    elementwise = True

    def __init__(
        self,
        *,
        number: int = 8,
        steps: int = 40,
        round_steps: int = 4,
        lr: float = 0.1,
        round_lr: float = 0.3,
        prior: float = 0.005,
        support: float = 0.6,
        warmup: int = 0,
        scale: float = 0.01,
    ) -> None:
        for name, whole, least in (
            ("number", number, 1),
            ("steps", steps, 1),
            ("round_steps", round_steps, 1),
            ("warmup", warmup, 0),
        ):
            if whole < least:
                raise ValueError(f"{name}={whole}: must be {least} or more")
        for name, value in (("lr", lr), ("round_lr", round_lr), ("scale", scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be over 0")
        if not 0 <= prior < math.inf:
            raise ValueError(f"prior={prior}: must be 0 or more")
        if not 0 < support < 1:
            raise ValueError(f"support={support}: must be over 0 and under 1")
        self.number, self.steps, self.round_steps, self.warmup = number, steps, round_steps, warmup
        self.lr, self.round_lr, self.prior, self.support, self.scale = lr, round_lr, prior, support, scale

    def steps_in_round(self, round: int) -> int:
        """See `Personalization.steps_in_round`."""
        return self.round_steps if round > self.warmup else 0

    @property
    def steps_after(self) -> int:
        """See `Personalization.steps_after`."""
        return self.steps

    def message_rank(self, rank: int) -> int:
        """See `Personalization.message_rank`: directions are columns of B."""
        return rank * (1 + self.number)

    def trained_rank(self, message_rank: int) -> int:
        """See `Personalization.trained_rank`."""
        return max(1, message_rank // (1 + self.number))

    def held_in_round(self, site: Site, rank: int) -> int:
        """See `Personalization.held_in_round`.

        While coefficients are trained, these are the directions as received (with rows of A), divided, and as loaded.
        While the rest is trained, B is also held before and after the coefficients are added.
        """
        received, directions = self.number * rank * (site.inputs + site.outputs), self.number * rank * site.outputs
        return received + max(2 * directions, directions + rank * (site.inputs + 3 * site.outputs))

    def initial(self, shared: Adapter, seed: int) -> Adapter:
        """See `Personalization.initial`."""
        return extend(shared, init_directions(shared, self.number, seed, scale=self.scale))

    def cleaned(self, shared: Adapter) -> Adapter:
        """See `Personalization.cleaned`: directions have no rows of A."""
        return extend(*divide(shared, self.number))

    def train_round(self, job: TrainJob, state: Adapter | None) -> Generator[Job, Result, RoundTraining]:
        """See `Personalization.train_round`; the start of `job` has the directions."""
        shared, directions = divide(job.start, self.number)
        job = job.with_first_variants()  # support and query have different pictures
        if job.frozen is not None:  # sites that aren't trained need no directions
            untrained = {name: factors for name, factors in job.frozen.items() if name not in job.start}
            job = replace(job, frozen={**job.frozen, **divide(untrained, self.number)[0]})
        if job.round <= self.warmup:
            trained = expect(TrainedAdapter, (yield replace(job, start=shared)))
            return RoundTraining(trained._replace(adapter=extend(trained.adapter, directions)), state)
        job = replace(job, loss_weights=None)  # they belong to all examples
        support, query = split_examples(job, self.support)
        below = shared if job.frozen is None else concatenate([shared, job.frozen])
        fitting = replace(job, examples=support, steps=self.round_steps, learning_rate=self.round_lr, frozen=below)
        fitted = yield from self._coefficients(fitting, shared, directions)
        assert fitted.coefficients is not None
        start = {name: Factors(a, b + fitted.adapter[name].b) for name, (a, b) in shared.items()}
        trained = expect(TrainedAdapter, (yield replace(job, start=start, examples=query)))
        change = outer_change(fitted.coefficients, start, trained.adapter)
        after = {name: Factors(a, b - fitted.adapter[name].b) for name, (a, b) in trained.adapter.items()}
        return RoundTraining(trained._replace(adapter=extend(after, shift_directions(directions, change))), state)

    def fit(self, job: TrainJob, shared: Adapter, captions: Sequence[str]) -> Generator[Job, Result, Adapter]:
        """See `Personalization.fit`."""
        del captions
        plain, directions = divide(shared, self.number)
        fitting = replace(job, steps=self.steps, learning_rate=self.lr, frozen=plain)
        fitted = yield from self._coefficients(fitting, plain, directions)
        on_top = replace(job, frozen=concatenate([plain, fitted.adapter]))
        return concatenate([fitted.adapter, expect(TrainedAdapter, (yield on_top)).adapter])

    def _coefficients(
        self, job: TrainJob, shared: Adapter, directions: Directions
    ) -> Generator[Job, Result, TrainedAdapter]:
        """Fit coefficients on top of the frozen adapter of `job`.

        Args:
            job: examples, steps and learning rate.
            shared: A [r, in] and B [out, r] per site.
            directions: D [K, out, r] per site.
        """
        fitting = replace(
            job,
            purpose=f"{job.purpose}-coefficients",
            start=personal_adapter(shared, directions, torch.zeros(self.number)),
            trains="coefficients",
            directions=directions,
            optimizer="adamw",
            proximal=self.prior,
            correction=None,
        )
        return expect(TrainedAdapter, (yield fitting))


def split_examples(job: TrainJob, fraction: float) -> tuple[Examples, Examples]:
    """Split a job's pictures at random, anew in each round; with one picture, both parts have it.

    Args:
        job: its examples are split.
        fraction: fraction in the first part; both parts have at least one picture.

    Returns:
        Support and query.
    """
    count = len(job.examples)
    if count < 2:
        return job.examples, job.examples
    generator = torch.Generator().manual_seed(derive_seed(job.seed, job.client, job.round, "support"))
    order = torch.randperm(count, generator=generator)
    first = min(max(1, round(fraction * count)), count - 1)
    parts = order[:first], order[first:]
    support, query = (Examples(job.examples.latents[part], job.examples.context[part]) for part in parts)
    return support, query
