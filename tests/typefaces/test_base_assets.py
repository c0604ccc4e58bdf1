"""The shipped glyph base: size, layout, and legibility."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from typefaces import dataset
from typefaces.judge import load

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

FOLDER = Path(dataset.__file__).parent / "assets" / "glyphs-base"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size_and_recorded_data() -> None:
    assert sum(file.stat().st_size for file in FOLDER.parent.rglob("*") if file.is_file()) <= 24_000_000
    assert not list(FOLDER.rglob("*.bin"))
    metrics = json.loads((FOLDER / "metrics.json").read_text())["metrics"]
    assert metrics["data_sha256"] == dataset.digest()
    assert metrics["legibility"]["1.5"] >= 0.95


def test_loads_in_fp32(pipe: StableDiffusionPipeline) -> None:
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    total = sum(p.numel() for p in pipe.unet.parameters())
    at_16 = (pipe.unet.conv_in, pipe.unet.down_blocks[0], pipe.unet.up_blocks[2], pipe.unet.conv_out)
    assert 3e6 <= total <= 6e6
    assert sum(p.numel() for part in at_16 for p in part.parameters()) < 0.1 * total


def test_vocabulary_matches_code(pipe: StableDiffusionPipeline) -> None:
    from typefaces.pretraining import architecture  # imports the training's part of diffusers

    vocab, merges = architecture.vocabulary()
    assert json.loads((FOLDER / "tokenizer" / "vocab.json").read_text(encoding="utf-8")) == vocab
    assert len((FOLDER / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()) == len(merges) + 1
    for text in ("digit 7", "capital letter A", "anything at all"):
        assert pipe.tokenizer(text).input_ids == architecture.tokenizer()(text).input_ids
    assert pipe.tokenizer.model_max_length == architecture.TOKENS


def test_samples_are_reproducible(pipe: StableDiffusionPipeline) -> None:
    first, repeated, different = (
        pipe("digit 7", num_inference_steps=2, guidance_scale=1, generator=torch.Generator().manual_seed(seed)).images[
            0
        ]
        for seed in (0, 0, 1)
    )
    assert (first.mode, first.size) == ("L", (64, 64))
    assert np.array_equal(first, repeated)
    assert not np.array_equal(first, different)


@pytest.mark.stress
def test_samples_are_legible(pipe: StableDiffusionPipeline) -> None:
    from typefaces.pretraining.evaluation import legibility

    share, pictures = legibility(pipe, load(), count=62, guidance=1.5, steps=10, seed=11)
    assert share >= 0.93
    assert pictures.std(axis=(1, 2)).min() > 20  # none is blank
