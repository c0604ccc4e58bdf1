"""Cores and their frames: exact there and back, and whatever is no frame is refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from conf.errors import AntherError
from models.adapter import Adapter, Factors, Site, shapes
from models.cores import (
    between,
    core_shapes,
    cores,
    empty,
    frame_from_tensors,
    from_trained_tensors,
    load_frame,
    to_framed_tensors,
    trained_tensors,
)
from models.slots import trained_layout

SITES = {"a": Site(7, 5), "b": Site(6, 9)}


def orthonormal(size: int, rank: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q


def framed(rank: int, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(orthonormal(s.inputs, rank, generator).T.contiguous(), orthonormal(s.outputs, rank, generator))
        for name, s in SITES.items()
    }


@given(st.integers(1, 5), st.integers(0, 100))
def test_there_and_back(rank: int, seed: int) -> None:
    frame, generator = framed(rank, seed), torch.Generator().manual_seed(seed)
    wanted = {key: torch.randn(shape, generator=generator) for key, shape in core_shapes(SITES, rank).items()}
    adapter = between(wanted, frame)
    found = cores(adapter, frame)
    layout = trained_layout(SITES, rank, frame)
    assert layout.size == 2 * rank * rank
    row = layout.pack(adapter)
    assert torch.allclose(row, torch.cat([wanted[f"{name}.core"].flatten() for name in SITES]), atol=1e-5)
    for name, (a, left) in frame.items():
        assert torch.allclose(found[f"{name}.core"], wanted[f"{name}.core"], atol=1e-5)
        assert torch.allclose(adapter[name].b @ adapter[name].a, left @ wanted[f"{name}.core"] @ a, atol=1e-5)
        assert torch.allclose(layout.unpack(row, adapter)[name].b, adapter[name].b, atol=1e-5)


def test_empty_adds_nothing_and_travels_with_its_frame() -> None:
    frame = framed(3)
    tensors = to_framed_tensors(empty(frame), frame)
    found = frame_from_tensors(tensors)
    assert all(not tensors[f"{name}.lora_B"].any() for name in SITES)
    assert all(
        torch.equal(found[name].b, frame[name].b) and torch.equal(found[name].a, frame[name].a) for name in SITES
    )


@pytest.mark.parametrize("factor", ["lora_A", "frame"])
def test_a_frame_that_is_not_orthonormal_is_refused(factor: str) -> None:
    frame = framed(3)
    tensors = to_framed_tensors(empty(frame), frame)
    tensors[f"b.{factor}"] = 1.01 * tensors[f"b.{factor}"]
    with pytest.raises(AntherError, match="b: the frame's factors are not orthonormal"):
        frame_from_tensors(tensors)


def test_a_frame_file_is_cut_to_what_is_asked(tmp_path: Path) -> None:
    frame, file = framed(4), tmp_path / "frame.safetensors"
    tensors = {k: v.contiguous() for k, v in to_framed_tensors(empty(frame), frame).items() if "lora_B" not in k}
    save_file(tensors, file)
    found = load_frame(file, {"b": SITES["b"]}, 2)
    assert list(found) == ["b"]
    assert torch.equal(found["b"].a, frame["b"].a[:2])
    assert torch.equal(found["b"].b, frame["b"].b[:, :2])
    for sites, rank, words in (
        ({"c": Site(2, 2)}, 2, "choose sites that it has"),
        (SITES, 5, "doesn't hold rank 5"),
        ({"a": Site(8, 5)}, 2, "doesn't hold rank 2 of this base"),
    ):
        with pytest.raises(AntherError, match=words):
            load_frame(file, sites, rank)
    file.write_bytes(b"nonsense")
    with pytest.raises(AntherError, match="can't be read as a frame"):
        load_frame(file, SITES, 2)
    with pytest.raises(AntherError, match="can't be read as a frame"):
        load_frame(tmp_path / "none", SITES, 2)


@pytest.mark.parametrize("between_factors", [False, True])
def test_what_training_changes_travels_there_and_back(between_factors: bool) -> None:
    frame = framed(3)
    found = between({name: torch.full((3, 3), 0.5) for name in core_shapes(SITES, 3)}, frame)
    tensors = trained_tensors(found, frame if between_factors else None)
    assert tensors.keys() == (core_shapes(SITES, 3) if between_factors else shapes(SITES, 3)).keys()
    back = from_trained_tensors(tensors, frame if between_factors else None)
    for name, pair in found.items():
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(back[name], pair, strict=True))
