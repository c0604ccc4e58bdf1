"""Frames of cores: as they travel, and whatever is none is refused in a line."""

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


def test_empty_adds_nothing_and_travels_with_its_frame() -> None:
    bases = random_bases(3)
    tensors = to_tensors_with_bases(zero_adapter(bases), bases)
    found = bases_from_tensors(tensors)
    assert all(not tensors[f"{name}.lora_B"].any() for name in SITES)
    assert all(
        torch.equal(found[name].b, bases[name].b) and torch.equal(found[name].a, bases[name].a) for name in SITES
    )


@pytest.mark.parametrize("factor", ["lora_A", "frame"])
def test_a_frame_that_is_not_orthonormal_is_refused(factor: str) -> None:
    bases = random_bases(3)
    tensors = to_tensors_with_bases(zero_adapter(bases), bases)
    tensors[f"b.{factor}"] = 1.01 * tensors[f"b.{factor}"]
    with pytest.raises(AntherError, match="b: the LoRA-XS bases are not orthonormal"):
        bases_from_tensors(tensors)


def test_a_frame_file_is_cut_to_what_is_asked(tmp_path: Path) -> None:
    bases, file = random_bases(4), tmp_path / "frame.safetensors"
    tensors = {
        k: v.contiguous() for k, v in to_tensors_with_bases(zero_adapter(bases), bases).items() if "lora_B" not in k
    }
    save_file(tensors, file)
    found = load_bases(file, {"b": SITES["b"]}, 2)
    assert list(found) == ["b"]
    assert torch.equal(found["b"].a, bases["b"].a[:2])
    assert torch.equal(found["b"].b, bases["b"].b[:, :2])
    for sites, rank, words in (
        ({"c": Site(2, 2)}, 2, "choose sites that they contain"),
        (SITES, 5, "don't have rank 5"),
        ({"a": Site(8, 5)}, 2, "don't have rank 2 for this base"),
    ):
        with pytest.raises(AntherError, match=words):
            load_bases(file, sites, rank)
    file.write_bytes(b"nonsense")
    with pytest.raises(AntherError, match="can't be read as LoRA-XS bases"):
        load_bases(file, SITES, 2)
    with pytest.raises(AntherError, match="can't be read as LoRA-XS bases"):
        load_bases(tmp_path / "none", SITES, 2)
