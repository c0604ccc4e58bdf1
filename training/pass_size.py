"""Fixed pass size for private jobs.

The kernels of a layer, and so the last bits of a gradient, depend on the number of entries in a pass, and an adapter
can be constructed that amplifies these bits to the whole gradient. If the pass size followed the batch size, adding
one picture would change the gradients of all others, and no clip would bound that change. So all passes of private
jobs have the same size, padded with entries of weight 0. The size follows from the device, the memory budget and the
plans, which are public.

At a fixed size, an entry's result depends neither on its position in the pass nor on its neighbors
(`tests/training/test_batch_independence.py`, bit for bit).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from training.jobs import TrainJob
from training.parallel_passes import workers

PASS_OVERHEAD_BYTES = {"cpu": 16e6, "cuda": 100e6}
"""Fixed cost of a pass (launches, Python), expressed as the bytes that take as long; from
`bench.throughput.private_cost`.
"""


def fixed_pass_size(device: torch.device, jobs: Sequence[TrainJob], limit: int, entry: int) -> int:
    """Choose the number of entries per pass for private jobs that are resident together and share a unit size.

    The size is the number of whole units, up to `limit`, that makes a step cheapest: few passes, little padding. A unit
    larger than `limit` is divided evenly.

    Args:
        device: the base's device.
        jobs: the resident jobs.
        limit: maximum number of entries per pass.
        entry: bytes of an entry (`training.capacity.entry_bytes`). For a large base, a pass of one picture is as cheap
            per picture as any other, and needs no padding.
    """
    unit = jobs[0].unit
    if unit > limit:
        return math.ceil(unit / math.ceil(unit / limit))
    assumed_pictures = max(1, sum(job.assumed_pictures for job in jobs))
    mean = sum(job.assumed_pictures * job.privacy.sampling_rate for job in jobs if job.privacy)
    counts, chances = batch_size_distribution(assumed_pictures, min(1.0, mean / assumed_pictures))
    overhead, parallel = PASS_OVERHEAD_BYTES[device.type] / entry, workers(device)

    def cost(units: int) -> float:
        return float(np.ceil(counts / (units * parallel)) @ chances) * (overhead + units * unit)

    return unit * min(range(1, min(limit // unit, assumed_pictures) + 1), key=cost)


def batch_size_distribution(assumed_pictures: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute the distribution of the size of a Poisson batch.

    Args:
        assumed_pictures: N.
        rate: sampling rate q in [0, 1].

    Returns:
        Sizes 0 … N, int64 [N + 1], and their binomial probabilities, float64 [N + 1], which sum to 1 up to float64
        rounding. If q is 0 or 1, both are [1].
    """
    counts = np.arange(assumed_pictures + 1)
    if rate in (0, 1):
        return counts[[-int(rate)]], np.ones(1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, assumed_pictures + 1)))])  # logarithms of factorials
    with np.errstate(divide="ignore", invalid="ignore"):
        chances = (
            logs[-1] - logs - logs[::-1] + counts * math.log(rate) + (assumed_pictures - counts) * math.log1p(-rate)
        )
    return counts, np.exp(chances)
