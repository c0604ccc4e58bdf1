"""Pages of a mapped file are released and read again; their contents don't change."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.lib.tiny import ATTENTION
from models.base.base import Base
from models.base.pack import pack
from models.files.paging import _MARKED, mark_mapped, release_pages
from models.quantization.blockwise import QuantizedTensor, quantize
from models.quantization.layers import QuantizedLinear

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident_bytes(file: Path) -> int:
    """Return the bytes of a mapped file that are in this process's memory."""
    text = Path("/proc/self/smaps").read_text()
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    actual = [part for part in parts if part.splitlines()[:1] and part.splitlines()[0].endswith(str(file))]
    return sum(int(re.search(r"^Rss: +(\d+) kB", part, re.MULTILINE)[1]) * 1024 for part in actual)  # type: ignore[index]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"x": torch.arange(1 << 20, dtype=torch.int32)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def mapped_tensor(file: Path) -> Tensor:
    with safe_open(file, "pt") as tensors:
        x = tensors.get_tensor("x")
    mark_mapped([x])
    return x


@linux
def test_released_pages_are_read_again(file: Path) -> None:
    x = mapped_tensor(file)
    before = x.sum()
    assert resident_bytes(file) >= x.nbytes
    release_pages(x, 0, len(x) // 2)
    assert resident_bytes(file) < 0.6 * x.nbytes
    release_pages(x, 0, 0)
    release_pages(x, 0, len(x))
    assert resident_bytes(file) < 0.1 * x.nbytes
    assert x.sum() == before
    assert torch.equal(x, torch.arange(1 << 20, dtype=torch.int32))


def test_unmapped_memory_is_not_released(file: Path) -> None:
    """MADV_DONTNEED would zero it."""
    unmapped, mapped = torch.arange(1 << 20), mapped_tensor(file)
    mark_mapped([unmapped])
    for x in (unmapped, mapped.clone(), mapped.long(), copy.deepcopy(mapped)):
        expected = x.clone()
        release_pages(x, 0, len(x))
        assert torch.equal(x, expected)


@pytest.mark.integration
@linux
def test_release_includes_readahead(tmp_path: Path) -> None:
    """Reading a page also reads its neighbors; none outside the file are released."""
    save_file({f"{i:03}": torch.full((5000,), i) for i in range(200)}, file := tmp_path / "many.safetensors")
    with safe_open(file, "pt") as tensors:
        parts = [tensors.get_tensor(name) for name in sorted(tensors.keys())]
    mark_mapped(parts)
    for part in parts:  # mapping has read them all
        release_pages(part, 0, len(part))
    for i, part in [*enumerate(parts)] * 2:
        assert int(part[0]) == i
        release_pages(part, 0, len(part))
        if i % 10 == 0:  # the query is slow
            assert resident_bytes(file) <= 1 << 17
    assert all(bool((part == i).all()) for i, part in enumerate(parts))


@linux
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layer_releases_read_pages(tmp_path: Path, kind: str) -> None:
    """In forward and backward; results equal those of a layer whose weight stays in memory."""
    plain = nn.Linear(2048, 2048)
    save_file(quantize(plain.weight, kind)._asdict(), file := tmp_path / "layer.safetensors")
    with safe_open(file, "pt") as tensors:
        parts = QuantizedTensor(*(tensors.get_tensor(name) for name in QuantizedTensor._fields))
    mark_mapped(parts)
    layer = QuantizedLinear(plain, parts)
    stays = QuantizedLinear(plain, quantize(plain.weight, kind))
    x = torch.randn(3, 2048, requires_grad=True)
    y, expected = layer(x), stays(x)
    assert torch.equal(y, expected)
    assert resident_bytes(file) < 0.2 * file.stat().st_size
    (actual,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(actual, *torch.autograd.grad(expected.sum(), x))
    assert resident_bytes(file) < 0.2 * file.stat().st_size
    layer.codes.sum()
    assert resident_bytes(file) > 0.8 * file.stat().st_size


def test_packed_base_and_copies_are_marked(pipeline_folder: Path, tmp_path: Path) -> None:
    """Jobs run in copies of the network, which share its tensors."""
    pack(str(pipeline_folder), tmp_path / "base", "int8")
    base = Base(tmp_path / "base", sites=ATTENTION)
    layers = [layer for layer in base._copy().modules() if isinstance(layer, QuantizedLinear)]
    assert layers
    assert all(layer.codes in _MARKED for layer in layers)
    assert not any(layer.double().codes.clone() in _MARKED for layer in layers)
