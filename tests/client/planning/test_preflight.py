"""Preflight check: memory of a pass against free memory, predicted once, refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.lib.tiny import ATTENTION
from client.planning import preflight
from client.planning.preflight import check_memory
from client.store.store import Store
from models.base.base import Base
from models.families.known import find_base
from models.footprint.footprint import MARGIN, example_shapes, footprint, meta_denoiser
from privacy.policy import RequestRefusedError
from privacy.storage import FileStorage
from training import passes


@pytest.fixture
def base(pipeline_folder: Path) -> Base:
    return Base(pipeline_folder, sites=ATTENTION)


def free(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    monkeypatch.setattr(preflight, "total_and_free", lambda _: (2**40, int(count)))


def predicted(base: Base, rank: int) -> int:
    known = find_base(str(base.folder))
    prediction = footprint(meta_denoiser(known, sites=ATTENTION), *example_shapes(known, base.resolution), rank=rank)
    return prediction.peak_bytes - prediction.base_bytes


@pytest.mark.integration
def test_plan_that_fits_is_accepted(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction equals that of the same base without weights."""
    store, needed = Store(FileStorage(tmp_path)), MARGIN * predicted(base, 4)
    free(monkeypatch, needed + 1)
    check_memory(base, store, 4, base.sites)
    free(monkeypatch, needed - 1)
    with pytest.raises(
        RequestRefusedError, match=f"memory: this base needs about .* MiB to train rank 4 at {base.resolution}²"
    ):
        check_memory(base, store, 4, base.sites)


@pytest.mark.integration
def test_prediction_keeps_weights(base: Base, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
    check_memory(base, Store(FileStorage(tmp_path)), 2, base.sites)
    after = base.network.state_dict()
    assert all(type(tensor) is torch.Tensor for tensor in after.values())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with base.use_adapters([]) as denoise, torch.no_grad():
        x = torch.zeros(1, *base.shape)
        assert type(denoise(x, torch.zeros(1), torch.zeros(1, *_context(base)))) is torch.Tensor


def _context(base: Base) -> torch.Size:
    return example_shapes(find_base(str(base.folder)), base.resolution)[1]


def test_other_sites_are_predicted_again(base: Base, pipeline_folder: Path) -> None:
    others = Base(pipeline_folder, sites=r".*\.to_q"), Base(pipeline_folder, sites=ATTENTION, weights="int8")
    assert len({preflight._key(one, 2, one.sites) for one in (base, *others)}) == 3


@pytest.mark.integration
def test_cached_buffers_are_released_before_refusal(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = MARGIN * predicted(base, 2)
    base.cache[passes._BUFFERS] = None, "as large as all that lacks"
    monkeypatch.setattr(
        preflight, "total_and_free", lambda _: (2**40, int(needed + (-1 if passes._BUFFERS in base.cache else 1)))
    )
    check_memory(base, Store(FileStorage(tmp_path)), 2, base.sites)
    assert passes._BUFFERS not in base.cache


@pytest.mark.integration
def test_fewer_sites_need_less_memory(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan at all sites is refused, and one at fewer sites is accepted."""
    few = [name for name in base.sites if name.startswith("up_blocks.0") and name.endswith("to_q")]
    store, needed = (
        Store(FileStorage(tmp_path)),
        preflight._pass_bytes(base, 4, {name: base.sites[name] for name in few}),
    )
    assert needed < predicted(base, 4)
    free(monkeypatch, MARGIN * needed + 1)
    check_memory(base, store, 4, few)
    with pytest.raises(RequestRefusedError, match="fewer sites"):
        check_memory(base, store, 4, base.sites)


@pytest.mark.integration
def test_each_rank_is_predicted_once(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later processes also use the cached prediction."""
    requested: list[tuple[int, int]] = []
    plain = preflight._pass_bytes
    monkeypatch.setattr(
        preflight,
        "_pass_bytes",
        lambda base, rank, sites: requested.append((rank, len(sites))) or plain(base, rank, sites),
    )
    few = list(base.sites)[:1]
    for rank, sites in ((2, base.sites), (2, base.sites), (4, base.sites), (4, base.sites), (4, few), (4, few)):
        check_memory(base, Store(FileStorage(tmp_path)), rank, sites)
    assert requested == [(2, len(base.sites)), (4, len(base.sites)), (4, 1)]
