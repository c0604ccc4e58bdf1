"""Judge, a small network that classifies glyphs and embeds their style, and the metrics computed with it.

    judge = load()
    classes = judge.read(images)        # uint8 [N, 64, 64], 0 = ink -> int [N], indices into GLYPHS
    styles = judge.embed(images)        # -> float32 [N, 128], unit length

*Legibility*: whether the judge reads a generated glyph as it reads the writer's real glyph of that character. The
generator is therefore not penalized for typefaces that the judge can't read. *Style match*: whether a generated glyph
is nearer to this writer's real held-out glyphs than to other writers'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import AntherError
from typefaces.dataset import GLYPHS, MERGED
from typefaces.strokes import normalize, thicken

FOLDER = Path(__file__).parent / "assets" / "judge"
WIDTHS = (24, 48, 96, 192)
STYLE = 128  # dimensions of the style embedding
VIEWS = (0.0, -0.5)  # changes of stroke width in pixels per side; a reading is the mean over them
BATCH = 32  # fits the caches of a core: 3.6 ms per image, 5.7 ms at 256

Images = NDArray[np.uint8]  # [N, 64, 64], 0 = ink, 255 = paper
Classes = NDArray[np.int64]  # [N], indices into GLYPHS
Styles = NDArray[np.float32]  # [N, STYLE], unit length


class Block(nn.Module):
    """Residual block: [B, in, H, W] -> [B, out, H/stride, W/stride]."""

    def __init__(self, *, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, outputs)
        self.skip = nn.Identity() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.first_norm(self.first(x)))
        return F.silu(self.skip(x) + self.second_norm(self.second(hidden)))


class JudgeNetwork(nn.Module):
    """Network of the judge: [B, 1, 64, 64] in [-1, 1] -> (glyph logits [B, 62], unit style embedding [B, 128])."""

    def __init__(self, widths: Sequence[int] = WIDTHS, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, 2, 1)
        self.stages = nn.ModuleList()
        inputs = widths[0]
        for width in widths:
            stride = 1 if width == inputs else 2
            self.stages.append(
                nn.Sequential(
                    Block(inputs=inputs, outputs=width, stride=stride), Block(inputs=width, outputs=width, stride=1)
                )
            )
            inputs = width
        self.glyph = nn.Sequential(nn.Dropout(dropout), nn.Linear(widths[-1], len(GLYPHS)))
        self.style = nn.Linear(sum(widths[1:]), STYLE)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden, pooled = self.stem(images), []
        for stage in self.stages:
            hidden = stage(hidden)
            pooled.append(hidden.mean(dim=(2, 3)))
        # style is visible in strokes as well as in shapes, hence features of three depths
        return self.glyph(pooled[-1]), F.normalize(self.style(torch.cat(pooled[1:], dim=1)).float(), dim=1)


@dataclass(frozen=True)
class Judge:
    """Trained network, called with NumPy images."""

    network: JudgeNetwork

    def read(self, images: Images) -> Classes:
        """Return the character that each image shows, as indices into GLYPHS.

        It has the highest mean log probability over views of the image with other stroke widths.
        """
        views = torch.stack([F.log_softmax(self._predict(images, 0, view), dim=1) for view in VIEWS])
        return np.asarray(views.mean(dim=0).argmax(dim=1).numpy(), dtype=np.int64)

    def embed(self, images: Images) -> Styles:
        """Return the style of each image: unit vectors, near each other for one typeface."""
        return np.asarray(self._predict(images, 1, 0.0).numpy())

    @torch.inference_mode()
    def _predict(self, images: Images, output: int, weight: float) -> Tensor:
        """Return an output of the network for images whose strokes are thicker by `weight` pixels per side."""
        if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (64, 64):
            raise ValueError(f"images must be uint8 [N, 64, 64], not {images.dtype} {list(images.shape)}")
        width = (len(GLYPHS), STYLE)[output]
        outputs = [torch.zeros(0, width)]
        device = next(self.network.parameters()).device
        for start in range(0, len(images), BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH])).to(device)
            pictures = normalize(batch[:, None])
            if weight:
                pictures = 1 - thicken(1 - pictures, torch.full((len(pictures),), weight, device=device))
            outputs.append(self.network(pictures)[output].float().cpu())
        return torch.cat(outputs)


def load(folder: Path | str = FOLDER, device: str = "cpu") -> Judge:
    """Load the judge in a folder (default: the shipped one) in fp32."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["glyphs"] != GLYPHS:
            raise AntherError(f"{folder}: this judge was trained on other characters: use another one")
        network = JudgeNetwork(config.get("widths", WIDTHS))
        network.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise AntherError(f"{folder}: holds no judge: train one with python -m typefaces.train_judge") from error
    return Judge(network.to(device).eval().requires_grad_(False))


def merge_classes(classes: Sequence[int] | Classes) -> Classes:
    """Replace each class by the first member of its group in MERGED."""
    table = np.arange(len(GLYPHS))
    for group in MERGED:
        table[[GLYPHS.index(glyph) for glyph in group]] = GLYPHS.index(group[0])
    return table[np.asarray(classes, dtype=np.int64)]


def legible(generated: Sequence[int] | Classes, real: Sequence[int] | Classes) -> NDArray[np.bool_]:
    """Return whether each generated glyph is read, after merging, as the writer's real glyph is read: bool [N].

    Both are readings [N] by the judge of the same characters in the same order. For a base without a writer, pass the
    captions' classes as `real`.
    """
    if len(generated) != len(real):
        raise ValueError(f"{len(generated)} generated glyphs, but {len(real)} real readings")
    return np.asarray(merge_classes(generated) == merge_classes(real))


def style_center(styles: Styles) -> Styles:
    """Return the normalized mean [D] of embeddings [M, D]: a writer's style."""
    mean = styles.mean(axis=0)
    return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), dtype=np.float32)


def style_match(generated: Styles, own: Styles, others: Sequence[Styles]) -> float:
    """Measure how reliably generated glyphs match their writer: 1 = always nearest, 0.5 = chance.

    For each generated glyph, the fraction of other writers whose center is further (smaller cosine) than the center of
    the writer's own glyphs, ties counting half; then the mean over glyphs.

    Args:
        generated: styles of generated glyphs [N, D].
        own: styles of the writer's real held-out glyphs [M, D].
        others: styles of each other writer's real held-out glyphs [M_k, D].
    """
    if not len(generated) or not len(own) or not others:
        raise ValueError("style_match needs generated glyphs, real glyphs, and at least one other writer")
    near = generated @ style_center(own)  # [N]
    far = generated @ np.stack([style_center(styles) for styles in others]).T  # [N, K]
    return float(((far < near[:, None]) + 0.5 * (far == near[:, None])).mean())
