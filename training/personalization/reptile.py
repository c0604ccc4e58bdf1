"""Reptile: the shared adapter is an initialization, and the device trains the adapter itself further.

With φ the shared adapter and U_i(φ) the adapter after several steps on the pictures of device i, a round is

    φ ← φ + ε 1/n Σ_i (U_i(φ) − φ)

(Nichol et al., 2018, arXiv:1803.02999, algorithm 2). These are the ordinary rounds: devices take several local steps
(`adapter.shared.steps`), and the server moves by ε towards their mean, with `aggregation=fedit` and
`server_optimizer=fedavgm server_optimizer.lr=ε server_optimizer.momentum=0`. With more than one local step, the
expected update also contains the gradient of the inner product of different batches' gradients (§5.1): it learns an
adapter from which a few steps get far. The method adds the other half: after the rounds each device computes U_i(φ),
with no part frozen.

Use it if devices take several steps in a round and have enough pictures to train the whole adapter. With few pictures a
LoRA on top, which has a rank of its own, is safer.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from models.lora.adapter import Adapter, Factors, concatenate
from training.jobs import Job, Result, TrainedAdapter, TrainJob, expect
from training.personalization import Personalization, personalization


@personalization("reptile")
class Reptile(Personalization):
    """Train a copy of the shared adapter; its difference to the shared one is the personal adapter, of twice the rank.

    Stores, exports and evaluations add a personal adapter to the shared one. The sum of both is the trained copy.
    """

    def personal_rank(self, rank: int, shared_rank: int) -> int:  # noqa: ARG002
        """See `Personalization.personal_rank`."""
        return shared_rank

    def fit(self, job: TrainJob, shared: Adapter, captions: Sequence[str]) -> Generator[Job, Result, Adapter]:
        """See `Personalization.fit`."""
        del captions
        trained = expect(TrainedAdapter, (yield replace(job, start=shared, frozen=None))).adapter
        return concatenate([trained, {name: Factors(a, -b) for name, (a, b) in shared.items()}])
