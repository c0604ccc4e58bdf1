"""AdamW and SGD on flat rows, with a learning rate and a number of steps for each row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW:
    """Algorithm 2 of Loshchilov & Hutter (2019, arXiv:1711.05101) without decay, on rows [S, D], by torch's own kernel.

    Padding stays zero: where every gradient was zero, so are both moments and the step.
    """

    def __init__(self, rows: Tensor, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.rows, self.betas, self.eps = rows, betas, eps
        self._mean, self._square = torch.zeros_like(rows), torch.zeros_like(rows)
        self._steps = rows.new_zeros(len(rows), dtype=torch.float32)
        self._rates = [0.0] * len(rows)

    def reset(self, rows: Sequence[int], rates: Sequence[float]) -> None:
        """Begin anew in these rows."""
        index = torch.tensor(rows, device=self.rows.device)
        for state in (self._mean, self._square, self._steps):
            state[index] = 0.0
        for row, rate in zip(rows, rates, strict=True):
            self._rates[row] = rate

    @torch.no_grad()
    def step(self, rows: Sequence[int], gradients: Tensor) -> None:
        """One step on these distinct rows [R], in place; gradients [R, D]."""
        alike = defaultdict(list)
        for place, row in enumerate(rows):
            alike[self._rates[row]].append((place, row))
        for rate, pairs in alike.items():
            params, means, squares, steps = (
                [state[row] for _, row in pairs] for state in (self.rows, self._mean, self._square, self._steps)
            )
            found = [gradients[place] for place, _ in pairs]
            adamw(
                params,
                found,
                means,
                squares,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=rate,
                weight_decay=0.0,
                eps=self.eps,
                maximize=False,
            )


class SGD:
    """w ← w − η g on rows [S, D]: the sum of K steps is η times the sum of their gradients, which is what SCAFFOLD's
    control variates are made of.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._rates = rows.new_zeros(len(rows), 1)

    def reset(self, rows: Sequence[int], rates: Sequence[float]) -> None:
        """Begin anew in these rows."""
        self._rates[torch.tensor(rows, device=self.rows.device)] = self.rows.new_tensor(rates)[:, None]

    @torch.no_grad()
    def step(self, rows: Sequence[int], gradients: Tensor) -> None:
        """One step on these distinct rows [R], in place; gradients [R, D]."""
        index = torch.tensor(rows, device=self.rows.device)
        self.rows.index_add_(0, index, self._rates[index] * gradients, alpha=-1)
