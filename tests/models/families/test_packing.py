"""Packing and unpacking of captions, and Flux patches."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from models.families.family import pack, unpack, unpack_mask
from models.families.flux import patchify, position_ids, unpatchify

sizes = st.integers(1, 40)


@given(tokens=sizes, width=sizes, size=sizes)
def test_vector_round_trip(tokens: int, width: int, size: int) -> None:
    context, vector = torch.randn(tokens, width), torch.randn(size)
    packed = pack(context, vector)
    actual = unpack(packed[None].expand(3, -1, -1), size)
    assert torch.equal(actual[0], context.expand(3, -1, -1))
    assert torch.equal(actual[1], vector.expand(3, -1))


@given(tokens=sizes, width=sizes)
def test_mask_round_trip(tokens: int, width: int) -> None:
    """For any number of rows: the mask has one number per token."""
    context, mask = torch.randn(tokens, width), torch.randint(0, 2, (tokens,))
    actual = unpack_mask(pack(context, mask)[None])
    assert torch.equal(actual[0][0], context)
    assert torch.equal(actual[1][0], mask.float())


@given(height=st.integers(1, 5), width=st.integers(1, 5), channels=st.integers(1, 3))
def test_flux_patches_match_diffusers(height: int, width: int, channels: int) -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, channels, 2 * height, 2 * width)
    expected = FluxPipeline._pack_latents(x, *x.shape)
    assert torch.equal(patchify(x), expected)
    assert torch.equal(unpatchify(expected, height, width), x)
    ids = FluxPipeline._prepare_latent_image_ids(2, height, width, x.device, x.dtype)
    assert torch.equal(position_ids(height, width, like=x), ids)
