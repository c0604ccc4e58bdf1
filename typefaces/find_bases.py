"""Find the directions in which public designers differ:  python -m typefaces.find_bases [--families 120]

For each adaptable layer W of the glyph base, the leading eigenvectors of Σ GᵀG and Σ GGᵀ, where G is the gradient that
one public family's letters have on W: the rows of A and the columns of L between which cores are trained
(`models.lora.lora_xs`). LoRA-SB takes them from the first gradient on the data itself (Singhal et al., 2024,
arXiv:2411.19557), which under privacy would have to be paid for; public letters cost nothing. Leaves
`assets/glyphs-frame/frame.safetensors`; `anther assets --pin` then makes it the one that ships.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from models.base.base import Base, load
from models.diffusion.objective import add_noise, per_example_loss, target
from typefaces import dataset

FILE = Path(__file__).with_name("assets") / "glyphs-frame" / "frame.safetensors"
SITES = r".*\.attn[12]\.to_(q|k|v|out\.0)"
RANK = 16  # directions kept
GLYPHS = 16  # of each family
SEED = 0


def gradients(base: Base, families: Sequence[dataset.Typeface]) -> Iterator[Mapping[str, Tensor]]:
    """The gradient [out, in] of each family's mean loss on every site's weights, timesteps stratified."""
    layers = {name: base.network.get_submodule(name).base for name in base.sites}
    weights = [layer.weight.requires_grad_() for layer in layers.values() if isinstance(layer, nn.Linear)]
    generator, drawing = torch.Generator().manual_seed(SEED), np.random.default_rng(SEED)
    for family in families:
        chosen = drawing.permutation(len(family.images))[:GLYPHS]
        latents = base.encode_images([family.images[glyph] for glyph in chosen])
        context = base.encode_captions([dataset.caption(dataset.GLYPHS[glyph]) for glyph in chosen])
        strata = torch.randperm(GLYPHS, generator=generator) / GLYPHS
        t = ((torch.rand(1, generator=generator) + strata) % 1 * len(base.schedule)).long()
        noise = torch.randn(latents.shape, generator=generator)
        with base.use_adapters([]) as denoise:
            output = denoise(add_noise(base.schedule, latents, noise, t), base.schedule.times[t], context)
            loss = per_example_loss(output, target(base.schedule, latents, noise, t)).mean()
            found = torch.autograd.grad(loss, weights)
        yield dict(zip(layers, found, strict=True))


def compute_bases(found: Iterable[Mapping[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """`<site>.lora_A` [rank, in] and `<site>.frame` [out, rank] from gradients [out, in]."""
    inner: dict[str, Tensor] = {}
    outer: dict[str, Tensor] = {}
    for gradients in found:
        for name, gradient in gradients.items():
            g = gradient.double()
            inner[name] = inner.get(name, 0.0) + g.T @ g
            outer[name] = outer.get(name, 0.0) + g @ g.T
    tensors = {}
    for name in inner:
        tensors[f"{name}.lora_A"] = leading_eigenvectors(inner[name], rank).T.float().contiguous()
        tensors[f"{name}.frame"] = leading_eigenvectors(outer[name], rank).float().contiguous()
    return tensors


def leading_eigenvectors(moment: Tensor, rank: int) -> Tensor:
    """Eigenvectors [d, rank] of a symmetric matrix [d, d], those of the largest eigenvalues first."""
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--families", type=int, default=120)
    families = dataset.load("public")
    chosen = np.random.default_rng(SEED).permutation(len(families))[: parser.parse_args().families]
    base = load("glyphs", sites=SITES)
    found = gradients(base, [families[place] for place in chosen])
    FILE.parent.mkdir(exist_ok=True)
    save_file(compute_bases(track(found, total=len(chosen)), RANK), FILE)


if __name__ == "__main__":
    main()
