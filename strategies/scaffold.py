"""SCAFFOLD on the server: its control variate through one round (`models.lora.scaffold`, algorithm 1, line 17)."""

from __future__ import annotations

import torch

from models.lora.scaffold import control_delta
from protocol.messages import TrainingPlan
from strategies.server_optimizers import Tensors, kept


def initial_control(control: Tensors | None, start: Tensors) -> Tensors:
    """c of a round that sends this of what is trained: zero before the first."""
    return control or {name: torch.zeros_like(tensor) for name, tensor in start.items()}


class ControlUpdate:
    """c⁺ = c + Σ (c_i⁺ − c_i) / N over the devices that replied, one after another.

    Args:
        control: c.
        start: what was sent, of what is trained.
        devices: N, those that can train, asked or not.
    """

    def __init__(self, control: Tensors, start: Tensors, *, devices: int) -> None:
        self._control, self._start, self._devices = control, start, devices
        self._next = {name: tensor.double() for name, tensor in control.items()}

    def add(self, plan: TrainingPlan, trained: Tensors) -> None:
        """What one device made of the plan that it was sent."""
        moved = {name: tensor - self._start[name] for name, tensor in trained.items()}
        for name, part in control_delta(self._control, moved, steps=plan.steps, rate=plan.learning_rate).items():
            self._next[name] += part / self._devices

    def next(self) -> Tensors:
        """c⁺ of all that were added."""
        return {name: kept(tensor) for name, tensor in self._next.items()}
