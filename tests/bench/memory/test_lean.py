"""Tests of the memory rungs and packed sizes on a tiny base."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.memory import lean, published_bases, weights_memory
from models.families.known import KNOWN_BASES, BaseSpec
from models.families.pixart import PIXART
from models.families.sdxl import SDXL
from models.families.stable_diffusion import STABLE_DIFFUSION
from models.files.diffusers_classes import diffusers_class
from tests.helpers.samples import sampled

SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 60,
}
PIXELS = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "in_channels": 4,
    "out_channels": 8,
    "use_additional_conditions": False,
}
TINY = {
    "sd15": BaseSpec(family=STABLE_DIFFUSION, config=SMALL),
    "sdxl": BaseSpec(family=SDXL, config=SMALL | ADDED),
    "pixart-sigma": BaseSpec(family=PIXART, config=PIXELS),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Replace bases by tiny ones, and run in this process."""
    for name, base in TINY.items():
        monkeypatch.setitem(KNOWN_BASES, name, base)

    def run_here(*arguments: str, allocator: bool = False) -> str:  # noqa: ARG001 - another process is spared
        run(monkeypatch, *arguments)
        return (capsys.readouterr().out.splitlines() or [""])[-1]

    monkeypatch.setattr(lean, "run_child", run_here)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["bench.memory.lean", *arguments])
        lean.main()


@pytest.mark.integration
@pytest.mark.parametrize("name", sampled(TINY, ["sd15"]))
def test_every_rung_is_compared_with_the_truth(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "lean.json"
    command = ["--base", name, "--side", "8", "--folder", str(tmp_path), "--output", str(output)]
    run(monkeypatch, *command, "--truth", "float32, mapped", "--rungs", "float32", "mixed", "mixed, pages, blocks")
    rungs = json.loads(output.read_text())[name]["8"]["rungs"]
    assert list(rungs) == ["float32", "float32, mapped", "mixed", "mixed, pages, blocks"]
    float32, mapped, mixed, last = rungs.values()
    assert [mapped["cosine"], float32["cosine"]] == pytest.approx([1.0, 1.0], abs=1e-9)
    assert 0.9 < mixed["cosine"] < 1 - 1e-6
    assert last["cosine"] == mixed["cosine"]  # these options only save memory and don't change the gradient
    assert 0 < last["tensors"] < mixed["tensors"]
    assert all(results["peak"] > results["imports"] for results in rungs.values())


@pytest.mark.integration
def test_run_replaces_only_its_own_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "lean.json"
    output.write_text(json.dumps({"sdxl": {"8": 1}, "sd15": {"8": 2, "64": 3}}))
    run(monkeypatch, "--side", "8", "--output", str(output), "--rungs")
    record = json.loads(output.read_text())
    assert (record["sdxl"], record["sd15"]["64"]) == ({"8": 1}, 3)
    assert record["sd15"]["8"]["target"]["peak"] == 1.1 * 1024
    assert list(record["sd15"]["8"]["rungs"]) == ["float32"]


@pytest.mark.parametrize(
    ("name", "kind"), [("sdxl", "UNet2DConditionModel"), ("pixart-sigma", "PixArtTransformer2DModel")]
)
def test_random_weights_match_diffusers_initialization(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_bases, "_SHARD", 1000)
    base = TINY[name]
    published_bases.write_base(base, tmp_path)
    part = tmp_path / base.family.network
    assert len(list(part.glob("*.safetensors"))) > 1
    network = diffusers_class(kind)
    written, initialized = network.from_pretrained(part), network(**base.config)
    torch.manual_seed(1)
    for (key, tensor), (_, reference) in zip(
        written.state_dict().items(), initialized.state_dict().items(), strict=True
    ):
        assert tensor.shape == reference.shape, key
        assert tensor.float().std(correction=0) == pytest.approx(reference.std(correction=0).item(), rel=0.6, abs=1e-6)


@pytest.mark.integration
def test_packed_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    published_bases.write_base(TINY["sd15"], tmp_path / "source")
    sizes = {form: weights_memory.measure(TINY["sd15"], tmp_path, form) for form in weights_memory.OURS}
    total = sum(tensor.nbytes for file in tmp_path.glob("*/*/*.safetensors") for tensor in load_file(file).values())
    assert 0 < sizes["nf4"]["bytes"] < sizes["mixed"]["bytes"] < sizes["int8"]["bytes"] < total
    assert all(size["peak"] > 0 for size in sizes.values())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_peer_has_zero_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert weights_memory.measure(TINY["sd15"], tmp_path, "torchao int8") == {"bytes": 0, "peak": 0}


def test_shared_tensors_are_counted_once() -> None:
    layer = torch.nn.Linear(3, 5)
    other = torch.nn.Linear(3, 5)
    other.weight = layer.weight
    assert weights_memory.tensor_bytes(torch.nn.Sequential(layer, other)) == 4 * (15 + 5 + 5)
