"""Sources of the judge's training, and a training in a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from conf.schemas.pretraining import StageConfig, TrainJudgeConfig
from typefaces import dataset
from typefaces.dataset import GLYPHS
from typefaces.judge import Judge, JudgeNetwork
from typefaces.people import Hand
from typefaces.pretraining import judge_training
from typefaces.pretraining.corpus import pictures
from typefaces.pretraining.judge_training import Penned, Printed, Written, judge_loss, read_rate, style_table
from typefaces.strokes import normalize
from typefaces.train_judge import build_sources, train_judge

STYLES = 3


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures(dataset.load("public")[:2])


@pytest.fixture(scope="module")
def table() -> Tensor:
    return style_table(2, STYLES, Generator().manual_seed(0))


@pytest.fixture(scope="module")
def penned(images: Tensor, table: Tensor) -> Penned:
    return Penned(images[:62], table[:STYLES], Generator().manual_seed(0))


def hands() -> list[Hand]:
    rng = np.random.default_rng(0)
    return [
        Hand(name, np.arange(first, first + count), rng.integers(0, 256, (count, 64, 64), np.uint8))
        for name, first, count in (("ann", 3, 2), ("bo", 10, 5))
    ]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_printed_characters_show_their_glyph_and_family(images: Tensor, table: Tensor) -> None:
    source = Printed(images, table)
    drawn = source.sample(300, Generator().manual_seed(1))
    assert source.styles == 2 * STYLES
    assert set(drawn.styles.tolist()) == set(range(2 * STYLES))
    likeness = []
    for picture, glyph, style in zip(*drawn, strict=True):
        row = int(style) // STYLES * len(GLYPHS) + int(glyph)
        likeness.append(
            (correlation(picture, normalize(images[row])), correlation(picture, normalize(images[row - 1])))
        )
    own, other = np.array(likeness).T
    assert own.mean() > other.mean() + 0.2


def test_pen_has_one_width_in_a_style(penned: Penned) -> None:
    drawn = penned.sample(400, Generator().manual_seed(1))
    assert drawn.pictures.min() >= -1
    assert drawn.pictures.max() <= 1
    ink = (1 - drawn.pictures).mean((1, 2, 3))
    bold, light = int(penned._radii.argmax()), int(penned._radii.argmin())
    assert ink[drawn.styles == bold].mean() > 1.2 * ink[drawn.styles == light].mean()


def test_written_characters_show_their_person() -> None:
    source = Written(hands(), torch.device("cpu"))
    drawn = source.sample(200, Generator().manual_seed(1))
    assert source.styles == 2
    owners = {3: 0, 4: 0, 10: 1, 11: 1, 12: 1, 13: 1, 14: 1}
    assert {int(glyph) for glyph in drawn.glyphs} == set(owners)
    assert [owners[int(glyph)] for glyph in drawn.glyphs] == drawn.styles.tolist()


def test_loss_numbers_the_styles_of_all_sources(penned: Penned, images: Tensor, table: Tensor) -> None:
    sources = [(Printed(images, table), 5), (penned, 4), (Written(hands(), torch.device("cpu")), 3)]
    total = sum(source.styles for source, _ in sources)
    assert total == 2 * STYLES + STYLES + 2

    def network(batch: Tensor) -> tuple[Tensor, Tensor]:
        assert batch.shape == (12, 1, 64, 64)
        return torch.zeros(12, len(GLYPHS)), torch.arange(total).float().repeat(12, 1)

    loss = judge_loss(network, sources, style=0.5, smoothing=0.0, generator=Generator().manual_seed(2))
    generator = Generator().manual_seed(2)
    styles = [source.sample(count, generator).styles for source, count in sources]
    expected = torch.cat([styles[0], styles[1] + 2 * STYLES, styles[2] + 3 * STYLES])
    style_loss = F.cross_entropy(torch.arange(total).float().repeat(12, 1), expected)
    assert float(loss) == pytest.approx(float(np.log(len(GLYPHS)) + 0.5 * style_loss), rel=1e-6)


def test_shares_of_a_batch(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_training, "center_lines", lambda pictures: pictures)
    config = TrainJudgeConfig(judge=StageConfig(batch_size=20), pen=0.25, people_share=0.5, styles=2)
    assert [count for _, count in build_sources(config, images[:62], hands())] == [5, 5, 10]
    assert [count for _, count in build_sources(config, images[:62], [])] == [15, 5]
    config = TrainJudgeConfig(judge=StageConfig(batch_size=20), pen=0.0)
    assert [count for _, count in build_sources(config, images, [])] == [20]


def test_a_few_steps(images: Tensor, tmp_path: Path) -> None:
    stage = StageConfig(steps=2, batch_size=8, warmup=1, compile=False, bf16=False)
    config = TrainJudgeConfig(judge=stage, output=str(tmp_path), widths=[8, 16], styles=2)
    network = train_judge(config, images[:62], hands())
    assert isinstance(network, JudgeNetwork)
    rates = read_rate(Judge(network), hands())
    assert rates["people"] == 2
    assert 0 <= rates["strict"] <= rates["merged"] <= 1


def test_read_rate_counts_characters() -> None:
    class Reads(JudgeNetwork):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return F.one_hot(torch.full((len(images),), GLYPHS.index("o")), len(GLYPHS)).float(), torch.zeros(1)

    written = [
        Hand(name, np.array([GLYPHS.index(g) for g in text]), np.zeros((len(text), 64, 64), np.uint8))
        for name, text in (("ann", "oO"), ("bo", "o0a"))
    ]
    assert read_rate(Judge(Reads([8, 16])), written) == {"people": 2, "strict": 0.4, "merged": 0.8, "worst": 2 / 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": [12, 16]}, r"widths=\[12, 16\]"),
        ({"widths": [8]}, r"widths=\[8\]"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"pen": 0.5, "people_share": 0.5}, r"pen=0\.5, people_share=0\.5"),
        ({"pen": -0.1}, r"pen=-0\.1"),
    ],
)
def test_invalid_config_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainJudgeConfig(**values)
