"""Real updates of mixed ranks, from two rounds of development writers' devices on the glyph base's adapter."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from common.seeding import derive_seed
from conf.compose import compose
from models.lora.adapter import Adapter, Factors, init_adapter, rank, split_rank
from simulations import setup
from strategies.aggregation import Updates
from strategies.aggregation.exact import Exact
from training.capacity import budget
from training.jobs import EncodeJob, Examples, TrainedAdapter, TrainJob

WRITERS, STEPS, BATCH, LEARNING_RATE = 16, 10, 4, 4e-3
ROUNDS = 2


def measure_errors(ranks: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Compute relative errors to the true mean after each round, for caps at each of these ranks.

    `of_best` is the largest ratio over sites of the exact rule's error to that of the best approximation
    (Eckart–Young), where the latter exceeds rounding; the other errors are over all sites together.
    """
    config = compose(f"data.writers={WRITERS} seed={seed}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base, people, database, _ = setup.build(config, Path(folder))
        perform = setup.make_perform(config, base, budget(None, base.device))
        encoded = cast(list[Examples], perform([EncodeJob(pictures=person.pictures.train) for person in people]))
        database.close()
    current = init_adapter(base.sites, max(ranks), derive_seed(seed, "shared"))
    for number in range(1, ROUNDS + 1):
        parts = [(*split_rank(current, r), r) for r in itertools.islice(itertools.cycle(ranks), len(people))]
        jobs = [
            TrainJob(
                client=person.name,
                round=number,
                purpose="shared",
                seed=seed,
                examples=examples,
                start=start,
                frozen=frozen if rank(frozen) else None,
                steps=STEPS,
                batch_size=BATCH,
                learning_rate=LEARNING_RATE,
            )
            for person, examples, (start, frozen, _) in zip(people, encoded, parts, strict=True)
        ]
        updates = [(cast(TrainedAdapter, trained).adapter, 1.0) for trained in perform(list(jobs))]
        for cap in ranks:
            rows.append({"round": number, "rank": cap, **relative_errors(current, updates, cap)})
        current = Exact(rank=max(ranks), max_rank=max(ranks), seed=seed).aggregate(current, updates, round=number)[0]
    return rows


def relative_errors(current: Adapter, updates: Updates, cap: int) -> dict[str, float]:
    """Compute the errors of one cap.

    Args:
        current: adapter before the round.
        updates: adapter and weight of each device.
        cap: largest rank of the result.
    """
    result = Exact(rank=cap, max_rank=cap, seed=0).aggregate(current, updates, round=1).adapter
    sums = dict.fromkeys(("whole", "best", "exact", "fedit_padded"), 0.0)
    worst = 1.0
    for site, factors in current.items():
        padded = [complete_factors(factors, adapter[site]) for adapter, _ in updates]
        mean = torch.stack([b @ a for a, b in padded]).mean(0)
        fedit = torch.stack([b for _, b in padded]).mean(0) @ torch.stack([a for a, _ in padded]).mean(0)
        squares = {
            "whole": mean.square().sum(),
            "best": (best_approximation(mean, cap) - mean).square().sum(),
            "exact": (result[site].b.double() @ result[site].a.double() - mean).square().sum(),
            "fedit_padded": (best_approximation(fedit, cap) - mean).square().sum(),
        }
        sums = {name: total + float(squares[name]) for name, total in sums.items()}
        if squares["best"] > 1e-10 * squares["whole"]:
            worst = max(worst, float((squares["exact"] / squares["best"]).sqrt()))
    relative = {name: (total / sums["whole"]) ** 0.5 for name, total in sums.items() if name != "whole"}
    return {**relative, "of_best": worst}


def complete_factors(current: Factors, trained: Factors) -> Factors:
    """Return a device's factors in float64, with the untrained ranks of the current ones appended."""
    size = len(trained.a)
    a, b = torch.cat([trained.a, current.a[size:]]), torch.cat([trained.b, current.b[:, size:]], dim=1)
    return Factors(a.double(), b.double())


def best_approximation(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a matrix with this rank (Eckart–Young)."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vh[:rank]
