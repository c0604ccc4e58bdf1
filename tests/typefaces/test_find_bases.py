"""The shipped LoRA-XS bases are orthonormal and cover every site of the base."""

from __future__ import annotations

import pytest
import torch

from models.base.base import load
from models.files import assets
from models.lora.lora_xs import load_bases
from tests.helpers.configs import compose
from typefaces.find_bases import RANK, SITES, compute_bases, leading_eigenvectors


@pytest.mark.integration
def test_shipped_bases_fit_the_base() -> None:
    base = load("glyphs", sites=compose("privacy=none").adapter.sites)
    result = load_bases(assets.locate("glyphs-frame") / "frame.safetensors", base.sites, RANK)
    assert result.keys() == base.sites.keys()
    assert base.sites.keys() == load("glyphs", sites=SITES).sites.keys()


def test_bases_match_svd() -> None:
    """For one gradient G = U S Vᵀ the bases are the first columns of V and U, up to sign."""
    gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(gradient)
    result = compute_bases([{"site": gradient}], 4)
    for own, expected in ((result["site.lora_A"], vh[:4]), (result["site.frame"].T, u.T[:4])):
        assert torch.allclose((own @ expected.T).abs(), torch.eye(4), atol=1e-4)


def test_leading_eigenvectors() -> None:
    moment = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    assert torch.equal(leading_eigenvectors(moment, 2).abs(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
