"""Numbers that methods hold in a round, against the peak of the tensors of a real one."""

from __future__ import annotations

import pytest

from models.base.base import Base
from models.footprint.tensor_memory import LiveStorages
from models.lora.adapter import Factors, init_adapter
from tests.helpers.reference_trainer import PLENTY, examples
from training import passes
from training.cohort import train
from training.jobs import TrainedAdapter, TrainJob
from training.personalization import Personalization, held_bytes
from training.personalization.directions import LearnedDirections
from training.personalization.fedalt import FedAlt

RANK = 8


def peak(base: Base, method: Personalization, rank: int) -> int:
    """Return the peak bytes of a round's passes, from the received adapter on."""
    base.cache.pop(passes._BUFFERS, None)
    pictures, sent, reached = examples(base, 4, 0), method.initial(init_adapter(base.sites, rank, 1), 2), 0
    with LiveStorages() as live:
        start = {name: Factors(a.clone(), b.clone()) for name, (a, b) in sent.items()}
        job = TrainJob(
            client="d",
            round=3,
            purpose="shared",
            seed=0,
            examples=pictures,
            start=start,
            steps=2,
            batch_size=1,
            learning_rate=0.001,
        )
        work = method.train_round(job, None)
        try:
            asked = next(work)
            while True:
                assert isinstance(asked, TrainJob)
                live.peak = live.live
                (result,) = train(base, [asked], memory=PLENTY, timesteps=2)
                assert isinstance(result, TrainedAdapter)
                reached = max(reached, live.peak)
                asked = work.send(result)
        except StopIteration:
            return reached


@pytest.mark.integration
@pytest.mark.parametrize(
    "method", [*(LearnedDirections(number=number) for number in (1, 4, 8)), *(FedAlt(rank=rank) for rank in (4, 8))]
)
def test_predicted_bytes_are_enough_and_few(
    method: Personalization, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_cores", lambda: 1)
    for _ in range(2):  # the first time a pass is measured too
        added = peak(base, method, RANK) - peak(base, Personalization(), RANK)
    predicted = held_bytes(method, base.sites, method.message_rank(RANK))
    assert added <= predicted <= 1.25 * added


def test_plain_training_holds_nothing_else(base: Base) -> None:
    assert held_bytes(Personalization(), base.sites, RANK) == 0
