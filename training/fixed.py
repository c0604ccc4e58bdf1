"""The one size of every pass of private jobs.

The kernels of a layer, and so the last bits of a gradient, depend on how many entries share a pass, and an adapter can
be made under which these bits grow to all of the gradient. If a pass held as many entries as a batch has, one picture
more would change the gradients of all others, and no clip would bound that. So passes of private jobs have one size,
filled up with entries of weight 0. It follows from the device, the memory granted and the plans, which are public.

At one size, what an entry finds depends neither on its place in the pass nor on its neighbors
(`tests/training/test_company.py`, bit for bit).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from training.jobs import Train
from training.passes import workers

BESIDE = {"cpu": 16e6, "cuda": 100e6}
"""Bytes of a pass that take as long as all that it does beside them: launches, and Python. `bench.private_cost`."""


def fixed_size(device: torch.device, jobs: Sequence[Train], most: int, entry: int) -> int:
    """Entries of every pass of these private jobs, which are resident together and agree in their unit; at most `most`.

    As many whole units as make a step cheapest: few passes, and little to fill up. Of a unit that is larger than
    `most`, an even share.

    Args:
        entry: bytes that an entry takes (`training.capacity.entry_bytes`). Of a large base a pass of one picture is as
            cheap as any other, and nothing has to be filled up.
    """
    unit = jobs[0].unit
    if unit > most:
        return math.ceil(unit / math.ceil(unit / most))
    assumed = max(1, sum(job.assumed for job in jobs))
    mean = sum(job.assumed * job.privacy.sampling_rate for job in jobs if job.privacy)
    counts, chances = pictures_of_a_step(assumed, min(1.0, mean / assumed))
    overhead, at_once = BESIDE[device.type] / entry, workers(device)

    def cost(units: int) -> float:
        return float(np.ceil(counts / (units * at_once)) @ chances) * (overhead + units * unit)

    return unit * min(range(1, min(most // unit, assumed) + 1), key=cost)


def pictures_of_a_step(assumed: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of a Poisson batch and their binomial chances, summing to 1 but for the rounding of float64."""
    counts = np.arange(assumed + 1)
    if rate in (0, 1):
        return counts[[-int(rate)]], np.ones(1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, assumed + 1)))])  # of factorials
    with np.errstate(divide="ignore", invalid="ignore"):
        chances = logs[-1] - logs - logs[::-1] + counts * math.log(rate) + (assumed - counts) * math.log1p(-rate)
    return counts, np.exp(chances)
