"""Costs of sets of sites, compared with a dry run for each."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest

from models.diffusion.denoiser import Denoiser
from models.footprint.dry_run import OPS_PER_BYTE
from models.footprint.footprint import Footprint, example_shapes, footprint, meta_denoiser
from models.footprint.site_costs import TRAINED_BYTES, PassCosts, pass_costs
from tests.helpers.networks import SMALL
from tests.helpers.samples import sampled

RANK = 3


def base(kind: str, checkpointing: str) -> Denoiser:
    return meta_denoiser(SMALL[kind], sites=SMALL[kind].family.sites, checkpointing=checkpointing)


def run(kind: str, checkpointing: str, sites: list[str]) -> Footprint:
    return footprint(base(kind, checkpointing), *example_shapes(SMALL[kind], 128), rank=RANK, sites=sites)


def work(result: Footprint) -> float:
    return result.matrix_operations + result.convolution_operations + OPS_PER_BYTE * result.moved_bytes


@cache
def costs(kind: str, checkpointing: str = "none") -> PassCosts:
    return pass_costs(base(kind, checkpointing), *example_shapes(SMALL[kind], 128), rank=RANK)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    sampled([("unet", "none"), ("pixart", "none"), ("pixart", "block")], [("pixart", "block")]),
)
def test_costs_match_dry_runs(kind: str, checkpointing: str) -> None:
    """Memory is never less, and without the base at most 1.5 times as large; time is within a quarter."""
    result = costs(kind, checkpointing)
    names = [site.name for site in result.sites]
    chance = random.Random(0)
    full = run(kind, checkpointing, names)
    fixed = full.base_bytes + full.objects_bytes
    assert result.bytes(names) == full.peak_bytes
    assert result.work(names) == pytest.approx(1.0)
    for selected in (names[-1:], names[len(names) // 2 :], chance.sample(names, 5)):
        expected = run(kind, checkpointing, selected)
        assert 1 <= (result.bytes(selected) - fixed) / (expected.peak_bytes - fixed) <= 1.5
        assert result.work(selected) * work(full) == pytest.approx(work(expected), rel=0.25)


@pytest.mark.integration
def test_later_sites_cost_less() -> None:
    result = costs("unet").sites
    names = [site.name for site in result]
    assert sorted(names) == sorted(base("unet", "none").sites)
    blocks = [name.split("_")[0] for name in names]
    assert blocks == sorted(blocks, key=["down", "mid", "up"].index)  # up blocks come last
    assert all(one.work >= other.work for one, other in itertools.pairwise(result))
    assert result[-1].peak_bytes < result[0].peak_bytes
    sites = base("unet", "none").sites
    assert all(
        one.site_bytes == TRAINED_BYTES * RANK * (sites[one.name].inputs + sites[one.name].outputs) for one in result
    )


@pytest.mark.integration
def test_invalid_sites_are_refused() -> None:
    result = costs("pixart")
    for selected in ([], ["nowhere"], [result.sites[0].name, "nowhere"]):
        with pytest.raises(ValueError, match="empty, or with a site"):
            result.bytes(selected)
        with pytest.raises(ValueError, match="empty, or with a site"):
            result.work(selected)
