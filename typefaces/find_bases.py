"""Compute LoRA-XS bases for the glyph base from public families:  python -m typefaces.find_bases [--families 120]

For each adaptable layer W of the glyph base, A and L are the leading eigenvectors of Σ GᵀG and Σ GGᵀ, where G is the
gradient of one public family's loss on W (`models.lora.lora_xs`). LoRA-SB takes them from the first gradient on the
private data (Singhal et al., 2024, arXiv:2411.19557), which would use privacy budget; public letters use none.
Writes `assets/glyphs-frame/frame.safetensors`; `anther assets --pin` then records it as the shipped asset.
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
RANK = 16
GLYPHS = 16  # per family
SEED = 0


def gradients(base: Base, families: Sequence[dataset.Typeface]) -> Iterator[Mapping[str, Tensor]]:
    """Yield the gradient [out, in] of each family's mean loss on every site's weight, with stratified timesteps."""
    layers = {name: base.network.get_submodule(name).base for name in base.sites}
    weights = [layer.weight.requires_grad_() for layer in layers.values() if isinstance(layer, nn.Linear)]
    generator, rng = torch.Generator().manual_seed(SEED), np.random.default_rng(SEED)
    for family in families:
        glyphs = rng.permutation(len(family.images))[:GLYPHS]
        latents = base.encode_images([family.images[glyph] for glyph in glyphs])
        context = base.encode_captions([dataset.caption(dataset.GLYPHS[glyph]) for glyph in glyphs])
        strata = torch.randperm(GLYPHS, generator=generator) / GLYPHS
        t = ((torch.rand(1, generator=generator) + strata) % 1 * len(base.schedule)).long()
        noise = torch.randn(latents.shape, generator=generator)
        with base.use_adapters([]) as denoise:
            output = denoise(add_noise(base.schedule, latents, noise, t), base.schedule.times[t], context)
            loss = per_example_loss(output, target(base.schedule, latents, noise, t)).mean()
            grads = torch.autograd.grad(loss, weights)
        yield dict(zip(layers, grads, strict=True))


def compute_bases(families: Iterable[Mapping[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """Compute `<site>.lora_A` [rank, in] and `<site>.frame` [out, rank] from each family's gradients [out, in]."""
    inner: dict[str, Tensor] = {}
    outer: dict[str, Tensor] = {}
    for gradients in families:
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
    """Return eigenvectors [d, rank] of a symmetric matrix [d, d], by decreasing eigenvalue."""
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--families", type=int, default=120)
    families = dataset.load("public")
    selected = np.random.default_rng(SEED).permutation(len(families))[: parser.parse_args().families]
    base = load("glyphs", sites=SITES)
    grads = gradients(base, [families[i] for i in selected])
    FILE.parent.mkdir(exist_ok=True)
    save_file(compute_bases(track(grads, total=len(selected)), RANK), FILE)


if __name__ == "__main__":
    main()
