"""What sets of sites cost, against a dry run of each."""

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

RANK = 3


def base(kind: str, checkpointing: str) -> Denoiser:
    return meta_denoiser(SMALL[kind], sites=SMALL[kind].family.sites, checkpointing=checkpointing)


def run(kind: str, checkpointing: str, sites: list[str]) -> Footprint:
    return footprint(base(kind, checkpointing), *example_shapes(SMALL[kind], 128), rank=RANK, sites=sites)


def work(found: Footprint) -> float:
    return found.matrix_operations + found.convolution_operations + OPS_PER_BYTE * found.moved_bytes


@cache
def costs(kind: str, checkpointing: str = "none") -> PassCosts:
    return pass_costs(base(kind, checkpointing), *example_shapes(SMALL[kind], 128), rank=RANK)


@pytest.mark.parametrize(("kind", "checkpointing"), [("unet", "none"), ("pixart", "none"), ("pixart", "block")])
def test_any_set_of_sites_takes_what_a_dry_run_of_it_does(kind: str, checkpointing: str) -> None:
    """Of memory never less, and beside the base at most half as much again; of time within a quarter."""
    found = costs(kind, checkpointing)
    names = [site.name for site in found.sites]
    chance = random.Random(0)
    whole = run(kind, checkpointing, names)
    fixed = whole.base_bytes + whole.objects_bytes
    assert found.bytes(names) == whole.peak_bytes
    assert found.work(names) == pytest.approx(1.0)
    for chosen in (names[-1:], names[len(names) // 2 :], chance.sample(names, 5)):
        wanted = run(kind, checkpointing, chosen)
        assert 1 <= (found.bytes(chosen) - fixed) / (wanted.peak_bytes - fixed) <= 1.5
        assert found.work(chosen) * work(whole) == pytest.approx(work(wanted), rel=0.25)


def test_sites_come_in_the_order_of_a_pass_and_cost_less_the_later_it_comes_to_them() -> None:
    found = costs("unet").sites
    names = [site.name for site in found]
    assert sorted(names) == sorted(base("unet", "none").sites)
    blocks = [name.split("_")[0] for name in names]
    assert blocks == sorted(blocks, key=["down", "mid", "up"].index)  # up blocks come last
    assert all(one.work >= other.work for one, other in itertools.pairwise(found))
    assert found[-1].peak_bytes < found[0].peak_bytes
    sites = base("unet", "none").sites
    assert all(
        one.site_bytes == TRAINED_BYTES * RANK * (sites[one.name].inputs + sites[one.name].outputs) for one in found
    )


def test_no_sites_and_unknown_ones_cost_nothing_that_anybody_knows() -> None:
    found = costs("pixart")
    for chosen in ([], ["nowhere"], [found.sites[0].name, "nowhere"]):
        with pytest.raises(ValueError, match="none given, or some"):
            found.bytes(chosen)
        with pytest.raises(ValueError, match="none given, or some"):
            found.work(chosen)
