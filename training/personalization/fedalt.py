"""Alternating training: in each round a device trains its own adapter first, then the shared one on top of it.

With u the shared adapter and v_i that of device i, both applied together, a round on a device is

    v_i ← τ_v steps on v_i at (u, v_i), with u frozen
    u_i ← τ_u steps on u at (u, v_i), with v_i frozen

and the server averages u_i (FedAlt: Pillutla et al., 2022, arXiv:2204.03809, algorithm 2). v_i stays on the device from
round to round. The shared adapter doesn't need to learn the part of a person's pictures that v_i explains.

Use it if the same devices take part in many rounds and differ much. A device that joins late starts like a LoRA on top.
During the rounds the shared adapter is measured without v_i.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace

import torch

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors, Site, concatenate, init_adapter, rank
from training.jobs import Job, Result, TrainedAdapter, TrainJob, expect
from training.personalization import Personalization, RoundTraining, personalization


@personalization("fedalt")
class FedAlt(Personalization):
    """A personal LoRA that is trained in every round before the shared adapter, and further after the rounds.

    Args:
        rank: rank of the personal LoRA.
        steps: τ_v, its optimizer steps in each round.
        lr: its learning rate in the rounds.
    """

    in_rounds = True

    def __init__(self, *, rank: int = 4, steps: int = 5, lr: float = 0.001) -> None:
        for name, whole in (("rank", rank), ("steps", steps)):
            if whole < 1:
                raise ValueError(f"{name}={whole}: must be 1 or more")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr={lr}: must be over 0")
        self.rank, self.steps, self.lr = rank, steps, lr

    def steps_in_round(self, round: int) -> int:  # noqa: ARG002
        """See `Personalization.steps_in_round`."""
        return self.steps

    @property
    def rank_in_round(self) -> int:
        """See `Personalization.rank_in_round`."""
        return self.rank

    def held_in_round(self, site: Site, rank: int) -> int:
        """See `Personalization.held_in_round`: the other adapter, before and after training, joined and as loaded."""
        return (4 * min(self.rank, rank) + 2 * rank) * (site.inputs + site.outputs)

    def personal_rank(self, rank: int, shared_rank: int) -> int:  # noqa: ARG002
        """See `Personalization.personal_rank`: that of the rounds, from which training continues."""
        return self.rank

    def train_round(self, job: TrainJob, state: Adapter | None) -> Generator[Job, Result, RoundTraining]:
        """See `Personalization.train_round`; the state is the personal adapter at all sites trained so far."""
        kept = state if state is not None and rank(state) == self.rank else {}
        before = {name: kept.get(name) or factors for name, factors in self._fresh(job).items()}
        elsewhere = {name: factors for name, factors in kept.items() if name not in job.start}
        fixed = [job.frozen] if job.frozen else []
        training = replace(
            job,
            purpose=f"{job.purpose}-personal",
            start=before,
            trains="both",
            frozen=concatenate([job.start, *fixed, elsewhere]),
            lora_xs_bases=None,
            steps=self.steps,
            learning_rate=self.lr,
            optimizer="adamw",
            proximal=0.0,
            correction=None,
        )
        personal = {**elsewhere, **expect(TrainedAdapter, (yield training)).adapter}
        trained = expect(TrainedAdapter, (yield replace(job, frozen=concatenate([*fixed, personal]))))
        return RoundTraining(trained, personal)

    def _fresh(self, job: TrainJob) -> Adapter:
        """Return an adapter without effect in the directions of the shared one, as a LoRA on top begins."""
        sites = {name: Site(a.shape[1], len(b)) for name, (a, b) in job.start.items()}
        drawn = init_adapter(sites, self.rank, derive_seed(job.seed, job.client, "fedalt"))
        return {name: Factors(torch.cat([job.start[name].a, a])[: self.rank], b) for name, (a, b) in drawn.items()}
