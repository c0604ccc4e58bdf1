"""AdamW and SGD on the rows of a matrix, with a learning rate and a step count for each row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW:
    """AdamW without weight decay on rows [S, D], with PyTorch's fused kernel.

    Algorithm 2 of Loshchilov & Hutter (2019, arXiv:1711.05101). Padding stays zero: if all gradients were zero, so are
    both moments and the step.
    """

    def __init__(self, rows: Tensor, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.rows, self.betas, self.eps = rows, betas, eps
        self._mean, self._square = torch.zeros_like(rows), torch.zeros_like(rows)
        self._steps = rows.new_zeros(len(rows), dtype=torch.float32)
        self._rates = [0.0] * len(rows)

    def reset(self, rows: Sequence[int], rates: Sequence[float]) -> None:
        """Set the state of these rows to zero, and set their learning rates."""
        index = torch.tensor(rows, device=self.rows.device)
        for state in (self._mean, self._square, self._steps):
            state[index] = 0.0
        for row, rate in zip(rows, rates, strict=True):
            self._rates[row] = rate

    @torch.no_grad()
    def step(self, rows: Sequence[int], gradients: Tensor) -> None:
        """Take one step on distinct rows [R], in place, with gradients [R, D]."""
        by_rate = defaultdict(list)
        for position, row in enumerate(rows):
            by_rate[self._rates[row]].append((position, row))
        for rate, pairs in by_rate.items():
            params, means, squares, steps = (
                [state[row] for _, row in pairs] for state in (self.rows, self._mean, self._square, self._steps)
            )
            selected = [gradients[position] for position, _ in pairs]
            adamw(
                params,
                selected,
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
    """SGD on rows [S, D]: w ← w − η g.

    The sum of K steps is η times the sum of their gradients, on which SCAFFOLD's control variates are based.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._rates = rows.new_zeros(len(rows), 1)

    def reset(self, rows: Sequence[int], rates: Sequence[float]) -> None:
        """Set the learning rates of these rows."""
        self._rates[torch.tensor(rows, device=self.rows.device)] = self.rows.new_tensor(rates)[:, None]

    @torch.no_grad()
    def step(self, rows: Sequence[int], gradients: Tensor) -> None:
        """Take one step on distinct rows [R], in place, with gradients [R, D]."""
        index = torch.tensor(rows, device=self.rows.device)
        self.rows.index_add_(0, index, self._rates[index] * gradients, alpha=-1)
