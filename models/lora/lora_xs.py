"""LoRA-XS: adapters that train only a small core, ΔW = L C A, with C [r, r] between frozen factors.

The *bases* are an Adapter with factors A, whose rows are orthonormal, and L, whose columns are. They are sent with an
adapter as `<site>.lora_A` and `<site>.frame`.

A core has r² numbers where factors have r (in + out). Under differential privacy this reduces the noise accordingly,
and the mean is exact, since L (Σ C_k) A is linear in the cores.

References:
    LoRA-XS (Bałazy et al., 2024, arXiv:2405.17604); LoRA-SB (Singhal et al., 2025, arXiv:2502.15436).
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

_ORTHONORMAL = 1e-3  # largest entry of |LᵀL − I| and |A Aᵀ − I|


def zero_adapter(bases: Adapter) -> Adapter:
    """Return the adapter in these bases whose product is zero: A [r, in] and B = 0 [out, r]."""
    return {name: Factors(a, torch.zeros_like(left)) for name, (a, left) in bases.items()}


def to_tensors_with_bases(adapter: Adapter, bases: Adapter) -> dict[str, Tensor]:
    """Flatten an adapter and its bases to the names of messages.

    Args:
        adapter: A [r, in] and B [out, r] per site.
        bases: A [r, in] and L [out, r] per site.

    Returns:
        `<site>.lora_A` [r, in], `<site>.lora_B` [out, r] and `<site>.frame` [out, r], which is L.
    """
    return to_tensors(adapter) | {f"{name}.frame": factors.b for name, factors in bases.items()}


def bases_from_tensors(tensors: Mapping[str, Tensor]) -> Adapter:
    """Extract the bases from received tensors.

    Args:
        tensors: `<site>.lora_A` [r, in] and `<site>.frame` [out, r], with names that `protocol.tensor_codec` has
            checked.

    Returns:
        A [r, in] and L [out, r] per site.

    Raises:
        AntherError: a factor isn't orthonormal; then Lᵀ B would not be the trained core.
    """
    names = [key.removesuffix(".frame") for key in tensors if key.endswith(".frame")]
    bases = {name: Factors(tensors[f"{name}.lora_A"], tensors[f"{name}.frame"]) for name in names}
    for name, (a, frame) in bases.items():
        for gram in (a @ a.T, frame.T @ frame):
            if not torch.allclose(gram, torch.eye(len(gram)), atol=_ORTHONORMAL, rtol=0.0):
                raise AntherError(f"{name}: the LoRA-XS bases are not orthonormal")
    return bases


def load_bases(file: Path, sites: Sites, rank: int) -> Adapter:
    """Load the first `rank` directions at these sites from a file, which may have more directions and sites.

    Args:
        file: safetensors.
        sites: dimensions by name.
        rank: r.

    Returns:
        A [r, in] and L [out, r] per site.

    Raises:
        AntherError: the file is missing or damaged, or lacks a site or directions.
    """
    try:
        tensors = load(file.read_bytes())
        selected = {
            key: value
            for name in sites
            for key, value in (
                (f"{name}.lora_A", tensors[f"{name}.lora_A"][:rank]),
                (f"{name}.frame", tensors[f"{name}.frame"][:, :rank]),
            )
        }
    except (OSError, SafetensorError) as error:
        raise AntherError(f"{file}: can't be read as LoRA-XS bases ({error})") from error
    except KeyError as error:
        lacking = str(error).strip("'").rpartition(".")[0]
        raise AntherError(
            f"{file}: the bases lack {lacking}: set adapter.sites to layers that they have, such as attention"
        ) from None
    for name, site in sites.items():
        shape = (tuple(selected[f"{name}.lora_A"].shape), tuple(selected[f"{name}.frame"].shape))
        if shape != ((rank, site.inputs), (site.outputs, rank)):
            raise AntherError(f"{file}: the bases at {name} don't have rank {rank} for this base")
    return bases_from_tensors(selected)
