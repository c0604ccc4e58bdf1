"""LoRA-XS bases: serialization, loading and validation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, Site
from models.lora.lora_xs import (
    bases_from_tensors,
    load_bases,
    to_tensors_with_bases,
    zero_adapter,
)

SITES = {"a": Site(7, 5), "b": Site(6, 9)}


def orthonormal(size: int, rank: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q


def random_bases(rank: int, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(orthonormal(s.inputs, rank, generator).T.contiguous(), orthonormal(s.outputs, rank, generator))
        for name, s in SITES.items()
    }


def test_zero_adapter_round_trip() -> None:
    bases = random_bases(3)
    tensors = to_tensors_with_bases(zero_adapter(bases), bases)
    result = bases_from_tensors(tensors)
    assert all(not tensors[f"{name}.lora_B"].any() for name in SITES)
    assert all(
        torch.equal(result[name].b, bases[name].b) and torch.equal(result[name].a, bases[name].a) for name in SITES
    )


@pytest.mark.parametrize("factor", ["lora_A", "frame"])
def test_non_orthonormal_bases_are_refused(factor: str) -> None:
    bases = random_bases(3)
    tensors = to_tensors_with_bases(zero_adapter(bases), bases)
    tensors[f"b.{factor}"] = 1.01 * tensors[f"b.{factor}"]
    with pytest.raises(AntherError, match="b: the LoRA-XS bases are not orthonormal"):
        bases_from_tensors(tensors)


def test_load_bases_selects_sites_and_rank(tmp_path: Path) -> None:
    bases, file = random_bases(4), tmp_path / "frame.safetensors"
    tensors = {
        k: v.contiguous() for k, v in to_tensors_with_bases(zero_adapter(bases), bases).items() if "lora_B" not in k
    }
    save_file(tensors, file)
    result = load_bases(file, {"b": SITES["b"]}, 2)
    assert list(result) == ["b"]
    assert torch.equal(result["b"].a, bases["b"].a[:2])
    assert torch.equal(result["b"].b, bases["b"].b[:, :2])
    for sites, rank, message in (
        ({"c": Site(2, 2)}, 2, "the bases lack c: set adapter.sites"),
        (SITES, 5, "don't have rank 5"),
        ({"a": Site(8, 5)}, 2, "don't have rank 2 for this base"),
    ):
        with pytest.raises(AntherError, match=message):
            load_bases(file, sites, rank)
    file.write_bytes(b"nonsense")
    with pytest.raises(AntherError, match="can't be read as LoRA-XS bases"):
        load_bases(file, SITES, 2)
    with pytest.raises(AntherError, match="can't be read as LoRA-XS bases"):
        load_bases(tmp_path / "none", SITES, 2)
