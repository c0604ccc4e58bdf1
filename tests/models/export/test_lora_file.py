"""LoRA files of other tools: scales, other kinds of adapters, damaged files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import AntherError
from models.export.lora_file import read_lora_file

A, B = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.ones(5, 4)
PAIRS = {
    "peft": ("unet.x.lora_A.weight", "unet.x.lora_B.weight"),
    "named adapter": ("unet.x.lora_A.default.weight", "unet.x.lora_B.default.weight"),
    "old diffusers": ("unet.x.lora.down.weight", "unet.x.lora.up.weight"),
    "processors": ("unet.x_lora.down.weight", "unet.x_lora.up.weight"),
    "kohya": ("unet.x.lora_down.weight", "unet.x.lora_up.weight"),
}


def written(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file(dict(tensors), folder / "a.safetensors", None if metadata is None else dict(metadata))
    return folder / "a.safetensors"


@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_pairs_of_every_tool(names: tuple[str, str], tmp_path: Path) -> None:
    module = read_lora_file(written(tmp_path, {names[0]: A.half(), names[1]: B.half()})).modules["unet.x"]
    assert module.down.dtype == torch.float32
    torch.testing.assert_close(module.up @ module.down, B @ A.half().float())


@pytest.mark.parametrize(
    ("alpha", "peft", "scale"),
    [
        (None, {}, 1.0),
        (2.0, {}, 0.5),
        (2.0, {"unet.lora_alpha": 100}, 0.5),  # the layer's own α counts
        (None, {"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        (None, {"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        (None, {"unet.lora_alpha": 8, "unet.alpha_pattern": {"x": 12}}, 3.0),
        (None, {"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_scale(alpha: float | None, peft: Mapping[str, object], scale: float, tmp_path: Path) -> None:
    tensors = {"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B}
    if alpha is not None:
        tensors["unet.x.alpha"] = torch.tensor(alpha)
    file = written(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(peft)} if peft else None)
    module = read_lora_file(file).modules["unet.x"]
    torch.testing.assert_close(module.up @ module.down, scale * B @ A)


def test_text_encoders_are_counted(tmp_path: Path) -> None:
    te = ("lora_te1_text_model_q.lora_down.weight", "lora_te1_text_model_q.lora_up.weight")
    ours = dict(zip(PAIRS["peft"], (A, B), strict=True))
    file = written(tmp_path, {**ours, te[0]: A.clone(), te[1]: B.clone(), "text_encoder_2.q.lora_A.weight": A.clone()})
    content = read_lora_file(file)
    assert content.modules.keys() == {"unet.x"}
    assert content.text_encoder_tensors == 3


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "is empty"),
        ({"weight": A}, r"not a LoRA \(weight\)"),
        ({"unet.x.lora_A.weight": A}, r"has no _B\.weight"),
        ({"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B, "y": A.clone()}, "1 tensors that no LoRA has"),
        ({"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B[:, :3].clone()}, "have no product"),
        ({"unet.x.lora_A.weight": A * float("nan"), "unet.x.lora_B.weight": B}, "not finite"),
        ({"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B, "unet.x.alpha": torch.ones(2)}, "must be one"),
        ({"lora_te_x.lora_down.weight": A, "lora_te_x.lora_up.weight": B}, "only adapts text encoders"),
        ({"lora_unet_x.hada_w1_a": A}, "is a LoHa"),
        ({"lora_unet_x.lokr_w1": A}, "is a LoKr"),
        (
            {"lora_unet_x.lora_down.weight": A, "lora_unet_x.lora_up.weight": B, "lora_unet_x.dora_scale": B},
            "is a DoRA",
        ),
        ({"lora_unet_x.lora_mid.weight": A}, "LoCon"),
        ({"lora_unet_x.diff": A}, "whole weights"),
    ],
)
def test_other_files_are_refused(tensors: Mapping[str, Tensor], message: str, tmp_path: Path) -> None:
    file = written(tmp_path, {name: tensor.clone() for name, tensor in tensors.items()})
    with pytest.raises(AntherError, match=message) as caught:
        read_lora_file(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_pickles_are_never_read(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(AntherError, match="is a pickle"):
        read_lora_file(file)
    torch.save({"x": A}, file)
    with pytest.raises(AntherError, match="is a pickle"):
        read_lora_file(file)


def test_header_of_any_length_is_no_pickle(tmp_path: Path) -> None:
    """The first byte of a pickle is also a possible length of a header."""
    tensors = dict(zip(PAIRS["peft"], (A, B), strict=True))
    starts = set()
    for length in range(0, 256, 8):
        file = written(tmp_path, tensors, {"note": "x" * length})
        starts.add(file.read_bytes()[0])
        assert read_lora_file(file).modules
    assert 0x80 in starts


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    file = written(tmp_path, dict(zip(PAIRS["peft"], (A, B), strict=True)))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(AntherError, match="not a safetensors file"):
        read_lora_file(file)
    file.write_text("x")
    with pytest.raises(AntherError, match="not a safetensors file"):
        read_lora_file(file)
    with pytest.raises(FileNotFoundError):
        read_lora_file(tmp_path / "b.safetensors")
    tensors = dict(zip(PAIRS["peft"], (A, B), strict=True))
    with pytest.raises(AntherError, match="lora_adapter_metadata can't be read"):
        read_lora_file(written(tmp_path, tensors, {"lora_adapter_metadata": "{"}))
