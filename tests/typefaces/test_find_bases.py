"""The frame that ships: orthonormal, for every site of the base, and of use."""

from __future__ import annotations

import torch

from conf.compose import compose
from models.base.base import load
from models.files import assets
from models.lora.lora_xs import load_bases
from typefaces.find_bases import RANK, SITES, compute_bases, leading_eigenvectors


def test_the_frame_fits_the_base_and_is_orthonormal() -> None:
    base = load("glyphs", sites=compose("privacy=none").adapter.sites)
    found = load_bases(assets.locate("glyphs-frame") / "frame.safetensors", base.sites, RANK)
    assert found.keys() == base.sites.keys()
    assert base.sites.keys() == load("glyphs", sites=SITES).sites.keys()


def test_directions_are_those_of_an_svd() -> None:
    """Of one gradient G = U S Vᵀ the leading directions are the first columns of V and of U, up to their signs."""
    gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(gradient)
    found = compute_bases([{"site": gradient}], 4)
    for own, wanted in ((found["site.lora_A"], vh[:4]), (found["site.frame"].T, u.T[:4])):
        assert torch.allclose((own @ wanted.T).abs(), torch.eye(4), atol=1e-4)


def test_leading_directions_come_first() -> None:
    moment = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    assert torch.equal(leading_eigenvectors(moment, 2).abs(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
