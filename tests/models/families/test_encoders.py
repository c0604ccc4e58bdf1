"""Incomplete text encoders and tokenizers are refused: the libraries would initialize missing weights at random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.lib.tiny import LETTERS, as_variant
from common.errors import AntherError
from models.base.base import Base
from models.families.checkpoint import recognize
from tests.helpers.samples import sampled
from tests.models.conftest import TinyPipeline
from tests.models.families.test_checkpoint import change
from tests.models.families.test_sentencepiece import PIECES, model_bytes


@pytest.fixture
def folder(pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))


def encoders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("text_encoder"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(AntherError, match=match) as refusal:
        recognize(folder).load_encoders()
    assert "\n" not in str(refusal.value)


def test_captions_are_distinguished(tiny: TinyPipeline) -> None:
    one, other = tiny.base.encode_captions(["cat", "dog"])
    assert not torch.equal(one, other)


def test_missing_weights_are_refused(tiny: TinyPipeline, tmp_path: Path) -> None:
    """The first matrix of every text encoder, and its last weight."""
    for encoder in encoders(tiny.folder):
        names = sorted(load_file(encoder / "model.safetensors"))
        for index in (names[0], names[len(names) // 2], names[-1]):
            copy = Path(shutil.copytree(tiny.folder, tmp_path / encoder.name / index))
            rewrite(copy / encoder.name, lambda tensors, name=index: {k: t for k, t in tensors.items() if k != name})
            refuse(copy, rf"{encoder.name}: lacks [12] of the weights that config\.json names")


def test_foreign_weights_are_refused(folder: Path) -> None:
    plain = Base(folder).encode_captions(["cat"])
    encoder = folder / "text_encoder"
    benign = {"text_model.embeddings.position_ids": torch.arange(8)[None], "logit_scale": torch.ones(())}
    rewrite(encoder, lambda tensors: tensors | benign | {"vision_model.x.weight": torch.ones(1)})
    assert torch.equal(Base(folder).encode_captions(["cat"]), plain)
    rewrite(encoder, lambda tensors: tensors | {"encoder.layers.1.mlp.fc1.weight": torch.ones(1)})
    refuse(folder, r"holds 1 weights that don't belong to a CLIPTextModel")
    rewrite(encoder, lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()})
    refuse(folder, "text_encoder: holds")


def test_wrong_shape_is_refused(folder: Path) -> None:
    rewrite(folder / "text_encoder", lambda tensors: tensors | {"final_layer_norm.weight": torch.ones(3)})
    refuse(folder, "text_encoder: ")


@pytest.mark.integration
@pytest.mark.parametrize("name", sampled(["fp16", "bf16", "mine"], ["fp16"]))
def test_single_variant_is_loaded(tiny: TinyPipeline, tmp_path: Path, name: str) -> None:
    copy = as_variant(Path(shutil.copytree(tiny.folder, tmp_path / "copy")), name, sharded=name == "fp16")
    actual = Base(copy, resolution=tiny.base.resolution)
    assert torch.equal(actual.encode_captions(["cat"]), tiny.base.encode_captions(["cat"]))
    for key, tensor in actual.network.state_dict().items():
        assert torch.equal(tensor, tiny.base.network.state_dict()[key])


def test_two_variants_are_refused(folder: Path) -> None:
    as_variant(folder, "bf16")
    shutil.copy(
        folder / "unet/diffusion_pytorch_model.bf16.safetensors",
        folder / "unet/diffusion_pytorch_model.ema.safetensors",
    )
    with pytest.raises(AntherError, match=r"several variants of its weights \(bf16, ema\)"):
        Base(folder)


class TestTokenizers:
    def test_without_a_vocabulary(self, tiny: TinyPipeline, tmp_path: Path) -> None:
        for name in [path.name for path in tiny.folder.iterdir() if path.name.startswith("tokenizer")]:
            copy = Path(shutil.copytree(tiny.folder, tmp_path / name))
            (copy / name / "tokenizer.json").unlink()
            refuse(copy, rf"{name}: (has no vocabulary|can't load)")

    def test_empty(self, folder: Path) -> None:
        for file in (folder / "tokenizer").iterdir():
            file.unlink()
        refuse(folder, "tokenizer: has no vocabulary")

    def test_default_length_is_the_encoders(self, folder: Path) -> None:
        plain = Base(folder).encode_captions(["cat " * 20])
        file = folder / "tokenizer/tokenizer_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in config.items() if key != "model_max_length"}))
        assert torch.equal(Base(folder).encode_captions(["cat " * 20]), plain)
        change(file, model_max_length=100)
        assert torch.equal(Base(folder).encode_captions(["cat " * 20]), plain)

    @pytest.mark.parametrize("longest", [0, -1])
    def test_invalid_length(self, folder: Path, longest: int) -> None:
        change(folder / "tokenizer/tokenizer_config.json", model_max_length=longest)
        refuse(folder, f"model_max_length={longest}")

    def test_another_models_tokenizer(self, folder: Path) -> None:
        change(folder / "text_encoder/config.json", vocab_size=10)
        rewrite(
            folder / "text_encoder",
            lambda tensors: {k: t[:10] if "token_embedding" in k else t for k, t in tensors.items()},
        )
        refuse(folder, "knows 10 tokens and its tokenizer")

    def test_sentencepiece_model_is_read(self, tiny: TinyPipeline, tmp_path: Path) -> None:
        """The published form of PixArt-Σ; without the sentencepiece library."""
        if tiny.name != "pixart":
            pytest.skip("of T5 alone")
        copy = Path(shutil.copytree(tiny.folder, tmp_path / "copy"))
        (copy / "tokenizer/tokenizer.json").unlink()
        pieces = [*PIECES[:4], *((letter, -3.0, 1) for letter in LETTERS)]  # those of its tokenizer.json
        (copy / "tokenizer/spiece.model").write_bytes(model_bytes(pieces))
        base = Base(copy, resolution=tiny.base.resolution)
        captions = ["a cat 7", "fox", None]
        assert torch.equal(base.encode_captions(captions), tiny.base.encode_captions(captions))
        (copy / "tokenizer/spiece.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\n")
        refuse(copy, r"spiece\.model: not a SentencePiece model")


class TestCode:
    """Nothing is loaded from outside the folder."""

    @pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
    def test_remote_attention(self, folder: Path, key: str) -> None:
        change(folder / "text_encoder/config.json", **{key: "evil/kernel"})
        refuse(folder, rf"{key}=evil/kernel: only eager and sdpa")
        change(folder / "text_encoder/config.json", **{key: None, "text_config": {key: "evil/kernel"}})
        refuse(folder, rf"{key}=evil/kernel: only eager and sdpa")

    def test_remote_adapter(self, folder: Path) -> None:
        (folder / "text_encoder/adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
        refuse(folder, "adapter_config")

    @pytest.mark.parametrize(
        ("part", "entry", "match"),
        [
            ("tokenizer", ["client.cli.enroll", "main"], "is from client.cli.enroll"),
            ("tokenizer", ["transformers", "AutoTokenizer"], "is a AutoTokenizer"),
            ("text_encoder", ["transformers", "AutoModel"], "is a AutoModel"),
            ("text_encoder", ["my_code", "CLIPTextModel"], "is from my_code"),
            ("unet", ["antigravity", "UNet2DConditionModel"], "is from antigravity"),
        ],
    )
    def test_classes_and_libraries(self, folder: Path, part: str, entry: list[str], match: str) -> None:
        change(folder / "model_index.json", **{part: entry})
        refuse(folder, match)

    def test_quantized(self, folder: Path) -> None:
        change(folder / "text_encoder/config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        refuse(folder, "is quantized")


def test_encoder_errors_are_one_line(tiny: TinyPipeline, tmp_path: Path) -> None:
    """T5 divides by the logarithm of this value."""
    if tiny.name != "pixart":
        pytest.skip("of T5")
    copy = Path(shutil.copytree(tiny.folder, tmp_path / "copy"))
    change(copy / "text_encoder/config.json", relative_attention_max_distance=0)
    with pytest.raises(AntherError, match=r"its text encoder can't be run \(math domain error\)"):
        Base(copy, resolution=16).encode_captions(["cat"])
