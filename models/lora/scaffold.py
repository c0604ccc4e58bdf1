"""Control variates: which way a device drifts, and everybody together (SCAFFOLD; Karimireddy et al., 2020,
arXiv:1910.06378, algorithm 1, option II).

A device takes K steps y ← y − η (g − c_i + c) from x, and then c_i⁺ = c_i − c + (x − y) / (K η): the mean gradient that
it saw. This holds for plain SGD alone; behind Adam's moments x − y is no sum of gradients. Since c_i⁺ − c_i has no c_i
in it, whoever knows x, c and y can tell it: nothing but the update travels upwards.

Controls are of what is trained, by the names that it travels under: factors, or cores.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_BESIDE = ".control"

ControlVariate = dict[str, Tensor]


def control_delta(
    server: Mapping[str, Tensor], moved: Mapping[str, Tensor], *, steps: int, rate: float
) -> ControlVariate:
    """c_i⁺ − c_i = −c − (y − x) / (K η), of what a device moved its adapter by; float64."""
    return {name: -server[name].double() - moved[name].double() / (steps * rate) for name in moved}


def to_control_tensors(control: Mapping[str, Tensor]) -> ControlVariate:
    """c, as it travels beside the adapter that is sent."""
    return {name + _BESIDE: tensor for name, tensor in control.items()}


def from_control_tensors(tensors: Mapping[str, Tensor]) -> ControlVariate:
    """Inverse of `to_control_tensors`: c alone, of all that was sent."""
    return {name.removesuffix(_BESIDE): tensor for name, tensor in tensors.items() if name.endswith(_BESIDE)}


def control_shapes(trained: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The exact keys and shapes of `to_control_tensors`, for the strict codec.

    Args:
        trained: of what the plan trains.
    """
    return {name + _BESIDE: shape for name, shape in trained.items()}
