"""AdamW on flat rows, with a learning rate for each slot."""

from __future__ import annotations

import torch
from torch import Tensor


class AdamW:
    """Algorithm 2 of Loshchilov & Hutter (2019, arXiv:1711.05101) without decay, on rows [S, D].

    Padding stays zero: where every gradient was zero, so are both moments and the step.
    """

    def __init__(self, rows: Tensor, rates: Tensor, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.rows, self.rates, self.betas, self.eps = rows, rates, betas, eps  # rates [S, 1]
        self._mean, self._square = torch.zeros_like(rows), torch.zeros_like(rows)
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Tensor) -> None:
        """One step on every row, in place."""
        self._steps += 1
        (one, two), t = self.betas, self._steps
        self._mean.lerp_(gradients, 1 - one)
        self._square.mul_(two).addcmul_(gradients, gradients, value=1 - two)
        denominator = (self._square / (1 - two**t)).sqrt_().add_(self.eps)
        self.rows.sub_(self.rates * (self._mean / (1 - one**t)) / denominator)
