"""The judge: merged readings, style match, and accuracy of the shipped network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import AntherError
from typefaces import dataset
from typefaces.dataset import GLYPHS, MERGED
from typefaces.judge import FOLDER, Judge, JudgeNetwork, legible, load, merge_classes, style_center, style_match
from typefaces.pretraining.corpus import split_held_out
from typefaces.pretraining.judge_training import measure


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load()


def index(glyphs: str) -> list[int]:
    return [GLYPHS.index(glyph) for glyph in glyphs]


def test_merged_classes() -> None:
    assert " ".join(MERGED) == "O0o Il1 Cc Kk Pp Ss Uu Vv Ww Xx Zz"
    members = "".join(MERGED)
    assert len(set(members)) == len(members)
    assert len(np.unique(merge_classes(np.arange(62)))) == 62 - sum(len(group) - 1 for group in MERGED)


def test_legible() -> None:
    generated, real = index("oIcAB7"), index("0lCAb1")
    assert legible(generated, real).tolist() == [True, True, True, True, False, False]
    assert legible(index("Q"), index("Q")).all()  # a typeface whose O reads as Q doesn't count against the generator
    with pytest.raises(ValueError, match="1 generated glyphs, but 2 real"):
        legible(index("a"), index("ab"))


def test_style_match() -> None:
    axes = np.eye(4, dtype=np.float32)
    others = [axes[[1, 1]], axes[[2]], axes[[3]]]
    assert style_match(axes[[0]], axes[[0, 0]], others) == 1
    assert style_match(axes[[1]], axes[[0]], others) == pytest.approx(1 / 3)  # 1 nearer, 2 tie
    assert style_match(axes[[0, 1]], axes[[0]], others) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one other writer"):
        style_match(axes[[0]], axes[[0]], [])


def test_random_style_match_is_chance() -> None:
    rng = np.random.default_rng(0)
    styles = rng.normal(size=(400, 16)).astype(np.float32)
    styles /= np.linalg.norm(styles, axis=1, keepdims=True)
    matches = [style_match(styles[:200], styles[[200 + i]], list(styles[220:300, None])) for i in range(20)]
    assert abs(np.mean(matches) - 0.5) < 0.1


def test_style_center() -> None:
    styles = np.array([[1, 0], [0, 1]], np.float32)
    assert np.allclose(style_center(styles), [2**-0.5, 2**-0.5])


def test_embeddings_are_normalized(judge: Judge) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    assert np.allclose(np.linalg.norm(judge.embed(pictures), axis=1), 1, atol=1e-5)
    assert judge.read(pictures[:0]).shape == (0,)
    assert judge.embed(pictures[:0]).shape == (0, 128)
    with pytest.raises(ValueError, match="uint8"):
        judge.read(pictures.astype(np.float32))


def test_images_are_judged_independently(judge: Judge) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (4, 64, 64), dtype=np.uint8)
    assert np.allclose(judge.embed(pictures)[2], judge.embed(pictures[2:3])[0], atol=1e-5)


class RecordingNetwork(JudgeNetwork):
    """Records its pictures. It prefers class 4 by a little, class 7 by much when strokes are thin."""

    def __init__(self) -> None:
        super().__init__([8, 16])
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(images)
        logits = torch.zeros(len(images), len(GLYPHS))
        logits[:, 4] = 1
        logits[:, 7] = (images.mean((1, 2, 3)) > self.seen[0].mean((1, 2, 3))) * 4.0
        return logits, torch.zeros(len(images), 128)


def test_reading_is_the_mean_over_stroke_widths() -> None:
    pictures = np.random.default_rng(2).integers(0, 256, (2, 64, 64), dtype=np.uint8)
    network = RecordingNetwork()
    assert Judge(network).read(pictures).tolist() == [7, 7]
    around = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), mode="edge")
    near = np.stack([around[:, y : y + 64, x : x + 64] for y in range(3) for x in range(3)]).astype(float)
    plain = pictures.astype(float)
    thin = (plain + near.max(0)) / 2  # half a pixel per side
    for view, expected in zip(network.seen, (plain, thin), strict=True):
        assert np.allclose(view[:, 0], expected / 127.5 - 1, atol=1e-5)


def test_missing_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="holds no judge") as refused:
        load(tmp_path)
    assert "\n" not in str(refused.value)


def test_shipped_judge_metadata() -> None:
    assert json.loads((FOLDER / "config.json").read_text())["data_sha256"] == dataset.digest()


def test_shipped_judge_is_frozen() -> None:
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert f"`{digest}`" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.integration
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.stress)])
def test_shipped_judge_accuracy(judge: Judge, every: int) -> None:
    """On a sample of the typefaces of the recorded metrics, or on all."""
    config = json.loads((FOLDER / "config.json").read_text())
    training = config["training"]
    _, held = split_held_out(dataset.load("public"), share=training["held_out"], seed=training["seed"])
    measured = measure(judge, held[::every])
    assert measured["merged"] >= 0.97
    assert measured["strict"] >= 0.90
    assert measured["retrieval_5"] >= 0.75
    for key, value in config["metrics"]["held_out_public"].items() if every == 1 else ():
        assert measured[key] == pytest.approx(value, abs=0.005), key
