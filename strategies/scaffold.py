"""SCAFFOLD on the server: update of its control variate in a round (`models.lora.scaffold`, algorithm 1, line 17)."""

from __future__ import annotations

import torch

from models.lora.scaffold import control_delta
from protocol.messages import TrainingPlan
from strategies.server_optimizers import Tensors, as_stored

CONTROL = "control"  # part of the strategy state; stored, don't change


def initial_control(control: Tensors | None, start: Tensors) -> Tensors:
    """Return c for a round that sends the trained tensors `start`; zero before the first round."""
    return control or {name: torch.zeros_like(tensor) for name, tensor in start.items()}


class ControlUpdate:
    """c⁺ = c + Σ (c_i⁺ − c_i) / N over the devices that replied, added one at a time.

    Args:
        control: c.
        start: trained tensors as sent.
        devices: N, the number of devices that can train, sampled or not.
    """

    def __init__(self, control: Tensors, start: Tensors, *, devices: int) -> None:
        self._control, self._start, self._devices = control, start, devices
        self._next = {name: tensor.double() for name, tensor in control.items()}

    def add(self, plan: TrainingPlan, trained: Tensors) -> None:
        """Add the result of one device for the plan that it was sent."""
        moved = {name: tensor - self._start[name] for name, tensor in trained.items()}
        for name, part in control_delta(self._control, moved, steps=plan.steps, rate=plan.learning_rate).items():
            self._next[name] += part / self._devices

    def next(self) -> Tensors:
        """Return c⁺."""
        return {name: as_stored(tensor) for name, tensor in self._next.items()}
