"""Coefficients over the principal directions in which people's own B differ from the shared one.

In the last round every device trains B only, on the A of the shared adapter, for `round_steps` steps. The server takes
the principal directions D_k of the changes B_i − B, scaled to the root mean square of their coefficients (probabilistic
PCA with a known mean: Tipping & Bishop, 1999, eq. 15):

    B_i ≈ B + Σ_k c_ik D_k,    c_i ~ N(0, I)

A person's adapter is then (B + Σ_k c_k D_k) A, with K coefficients that are fitted to their pictures, and a LoRA on
top, as with `directions`. On a common A, a linear combination of B is one of the products (FFA-LoRA: Sun et al., 2024,
arXiv:2403.12313).

The shared adapter stays as it was before that round. The mean of the B_i isn't used in its place: after many steps on
few pictures each, it generalizes worse. What people changed alike is among the directions.

Use it if there are several times more devices than directions, above all for people who join after the rounds. Compared
with `directions` only the last round differs, but the server needs the update of each device.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence

import torch

from models.lora.adapter import Adapter
from models.lora.directions import extend, principal_directions
from training.jobs import Job, Result, TrainJob
from training.personalization import Personalization, personalization
from training.personalization.directions import LearnedDirections

log = logging.getLogger(__name__)


@personalization("population")
class Population(Personalization):
    """Coefficients over principal directions of the last round's updates, then a LoRA on top.

    Args:
        number: K, the number of directions; the last round needs more devices.
        round_steps: optimizer steps on B in the last round; only the directions depend on them.
        steps: optimizer steps on the coefficients after the rounds, at most.
        lr: learning rate of the coefficients.
        prior: weight of ‖c‖²/2 in their loss; coefficients have a mean square of 1 over people.
    """

    def __init__(
        self, *, number: int = 4, round_steps: int = 40, steps: int = 40, lr: float = 0.1, prior: float = 0.005
    ) -> None:
        if round_steps < 1:
            raise ValueError(f"round_steps={round_steps}: must be 1 or more")
        self._coefficients = LearnedDirections(number=number, steps=steps, lr=lr, prior=prior)
        self.number, self.last_round_steps = number, round_steps

    @property
    def steps_after(self) -> int:
        """See `Personalization.steps_after`; without directions there are none."""
        return self._coefficients.steps

    def after_last_round(self, shared: Adapter, trained: Sequence[Adapter]) -> Adapter:
        """See `Personalization.after_last_round`; missing directions of too few devices are zero."""
        found = min(self.number, len(trained))
        if found < self.number:
            log.warning("%d devices have only %d of %d principal directions", len(trained), found, self.number)
        directions = principal_directions(shared, trained, found)
        padding = {name: b.new_zeros(self.number - found, *b.shape) for name, (_, b) in shared.items()}
        return extend(shared, {name: torch.cat([directions[name], padding[name]]) for name in shared})

    def fit(self, job: TrainJob, shared: Adapter, captions: Sequence[str]) -> Generator[Job, Result, Adapter]:
        """See `Personalization.fit`; without directions, after a last round without replies, only the LoRA on top."""
        if not self._has_directions(shared):
            return (yield from super().fit(job, shared, captions))
        return (yield from self._coefficients.fit(job, shared, captions))

    def _has_directions(self, shared: Adapter) -> bool:
        """Return whether the adapter has rank without rows of A, as `extend` makes it."""
        if any(len(a) % (1 + self.number) for a, _ in shared.values()):
            return False
        return not any(a[len(a) // (1 + self.number) :].any() for a, _ in shared.values())
