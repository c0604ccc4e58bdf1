"""Control variates of SCAFFOLD, which correct the drift of devices from the common direction.

A device takes K steps y ← y − η (g − c_i + c) from x, and then c_i⁺ = c_i − c + (x − y) / (K η): its mean gradient.
This holds only for plain SGD; with Adam's moments x − y is not a sum of gradients. Since c_i⁺ − c_i doesn't contain
c_i, it follows from x, c and y: only the update is uploaded.

Control variates have the names and shapes of the trained tensors: factors or cores.

References:
    Karimireddy et al., 2020, arXiv:1910.06378, algorithm 1, option II.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_SUFFIX = ".control"  # in messages; don't change

ControlVariate = dict[str, Tensor]
"""Tensors by name of a trained tensor, with its shape (`models.lora.trainable.trained_shapes`)."""


def control_delta(
    server: Mapping[str, Tensor], moved: Mapping[str, Tensor], *, steps: int, rate: float
) -> ControlVariate:
    """Compute c_i⁺ − c_i = −c − (y − x) / (K η).

    Args:
        server: c, with the shapes of the trained tensors.
        moved: y − x, as c; may lack some of its tensors.
        steps: K.
        rate: η.

    Returns:
        c_i⁺ − c_i, float64, for the tensors of `moved`.
    """
    return {name: -server[name].double() - moved[name].double() / (steps * rate) for name in moved}


def to_control_tensors(control: Mapping[str, Tensor]) -> ControlVariate:
    """Flatten c, with its shapes, to the names under which it is sent with the adapter."""
    return {name + _SUFFIX: tensor for name, tensor in control.items()}


def from_control_tensors(tensors: Mapping[str, Tensor]) -> ControlVariate:
    """Invert `to_control_tensors`: extract c from all received tensors; shapes stay as received."""
    return {name.removesuffix(_SUFFIX): tensor for name, tensor in tensors.items() if name.endswith(_SUFFIX)}


def control_shapes(trained: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the exact keys and shapes of `to_control_tensors`, for the strict codec.

    Args:
        trained: keys and shapes of the trained tensors.
    """
    return {name + _SUFFIX: shape for name, shape in trained.items()}
