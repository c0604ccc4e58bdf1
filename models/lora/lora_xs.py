"""Adapters of which only a small core is trained: ΔW = L C A, with C [r, r] between factors that stay.

LoRA-XS (Bałazy et al., 2024, arXiv:2405.17604) and LoRA-SB (Singhal et al., 2025, arXiv:2502.15436). A core has r²
numbers where factors have r (in + out): under differential privacy that much less noise, and an exact mean, since
L (Σ C_k) A is linear in the cores.

A *frame* is an Adapter whose factors are A, with orthonormal rows, and L, with orthonormal columns. It travels beside
an adapter under the names `<site>.lora_A` and `<site>.frame`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, Sites, to_tensors

_ORTHONORMAL = 1e-3  # largest difference of LᵀL or A Aᵀ from the identity


def zero_adapter(bases: Adapter) -> Adapter:
    """The adapter between this frame whose product is zero."""
    return {name: Factors(a, torch.zeros_like(left)) for name, (a, left) in bases.items()}


def to_tensors_with_bases(adapter: Adapter, bases: Adapter) -> dict[str, Tensor]:
    """An adapter with its frame, as they travel."""
    return to_tensors(adapter) | {f"{name}.frame": factors.b for name, factors in bases.items()}


def bases_from_tensors(tensors: Mapping[str, Tensor]) -> Adapter:
    """The frame in such tensors, whose names `protocol.tensor_codec` has checked.

    Raises:
        AntherError: its factors are not orthonormal: Lᵀ B would not be what was trained.
    """
    names = [key.removesuffix(".frame") for key in tensors if key.endswith(".frame")]
    bases = {name: Factors(tensors[f"{name}.lora_A"], tensors[f"{name}.frame"]) for name in names}
    for name, (a, left) in bases.items():
        for gram in (a @ a.T, left.T @ left):
            if not torch.allclose(gram, torch.eye(len(gram)), atol=_ORTHONORMAL, rtol=0.0):
                raise AntherError(f"{name}: the frame's factors are not orthonormal")
    return bases


def load_bases(file: Path, sites: Sites, rank: int) -> Adapter:
    """The first `rank` directions at these sites of a frame file, which may hold more of both.

    Raises:
        AntherError: it is missing or damaged, or doesn't hold so much.
    """
    try:
        tensors = load(file.read_bytes())
        cut = {
            key: value
            for name in sites
            for key, value in (
                (f"{name}.lora_A", tensors[f"{name}.lora_A"][:rank]),
                (f"{name}.frame", tensors[f"{name}.frame"][:, :rank]),
            )
        }
    except (OSError, SafetensorError) as error:
        raise AntherError(f"{file}: can't be read as a frame ({error})") from error
    except KeyError as error:
        raise AntherError(f"{file}: the frame has no {error}: choose sites that it has") from None
    for name, site in sites.items():
        shape = (tuple(cut[f"{name}.lora_A"].shape), tuple(cut[f"{name}.frame"].shape))
        if shape != ((rank, site.inputs), (site.outputs, rank)):
            raise AntherError(f"{file}: the frame at {name} doesn't hold rank {rank} of this base")
    return bases_from_tensors(cut)
