"""A device's stored data is read back unchanged, or reported as damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from client.store.personal_versions import MARK
from client.store.store import PersonalAdapter, Store
from common.errors import AntherError
from models.lora.adapter import Site, to_tensors
from privacy.storage import FileStorage
from tests.helpers.devices import BASE, SITES, adapter
from training.jobs import Examples

PERSONAL = PersonalAdapter(adapter(2), adapter(5, seed=1), BASE, "run:3")
EXAMPLES = Examples(torch.randn(3, 4, 2, 2), torch.randn(3, 7, 2))


def test_personal_adapter_round_trip(tmp_path: Path) -> None:
    assert Store(FileStorage(tmp_path)).personal(SITES) is None
    Store(FileStorage(tmp_path / "new")).save_personal(PERSONAL)
    loaded = Store(FileStorage(tmp_path / "new")).personal(SITES)
    assert loaded is not None
    assert loaded.base == BASE
    for part, expected in ((loaded.adapter, PERSONAL.adapter), (loaded.shared, PERSONAL.shared)):
        assert part.keys() == expected.keys()
        assert all(torch.equal(a, b) for name in SITES for a, b in zip(part[name], expected[name], strict=True))


def test_other_tools_refuse_the_file(tmp_path: Path, pipeline_folder: Path) -> None:
    """They would ignore all names and draw without the adapter."""
    from diffusers import StableDiffusionPipeline

    Store(FileStorage(tmp_path)).save_personal(PERSONAL)
    file = tmp_path / "personal.safetensors"
    with pytest.raises(SafetensorError):
        load_file(file)
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    with pytest.raises((SafetensorError, OSError)):
        pipeline.load_lora_weights(file)


def test_file_without_mark_is_read(tmp_path: Path) -> None:
    store, file = Store(FileStorage(tmp_path)), tmp_path / "personal.safetensors"
    store.save_personal(PERSONAL)
    marked = store.personal(SITES)
    file.write_bytes(file.read_bytes().removeprefix(MARK))
    assert load_file(file)
    plain = Store(FileStorage(tmp_path)).personal(SITES)
    assert marked is not None
    assert plain is not None
    for name in SITES:
        assert torch.equal(plain.adapter[name].a, marked.adapter[name].a)
    store.save_personal(PERSONAL, aside=True)
    assert len(store.personal_versions()) == 2
    store.roll_back()
    assert store.personal(SITES) is not None


def requests(store: Store) -> list[str]:
    """Return the requests of all stored versions, newest first; only the current one may change."""
    values, present = [], next(one.created for one in store.personal_versions() if one.is_current)
    for one in store.personal_versions():
        if not one.is_current:
            store.roll_back(one.created)
        personal = store.personal(SITES)
        values.append(personal.request if personal else "")
    if not next(one.is_current for one in store.personal_versions() if one.created == present):
        store.roll_back(present)
    return values


def test_previous_adapters_are_kept_by_date(tmp_path: Path) -> None:
    store = Store(FileStorage(tmp_path))
    for number in range(1, 10):
        store.save_personal(PERSONAL._replace(request=f"run:{number}"), aside=True)
    assert requests(store) == [f"run:{number}" for number in (9, 8, 7, 6, 5, 4, 3)]
    for number in (8, 7, 6, 5, 4, 3):  # one after the other
        store.roll_back()
        loaded = Store(FileStorage(tmp_path)).personal(SITES)
        assert loaded is not None
        assert loaded.request == f"run:{number}"
    with pytest.raises(AntherError, match="no previous adapter; available: 20"):
        store.roll_back()
    assert requests(store)[0] == "run:9"
    with pytest.raises(AntherError, match="no adapter of 2001-01-01; available: 20"):
        store.roll_back("2001-01-01")


def test_last_adapter_of_a_base_is_kept(tmp_path: Path) -> None:
    store = Store(FileStorage(tmp_path))
    store.save_personal(PERSONAL._replace(request="old"))
    for number in range(20):
        store.save_personal(PERSONAL._replace(base="c" * 64, request=f"run:{number}"), aside=True)
    assert requests(store)[-1] == "old"


def test_undated_adapter_is_the_oldest(tmp_path: Path) -> None:
    """A store of an earlier version: one previous adapter, and no dates."""
    store = Store(FileStorage(tmp_path))
    for name, number in (("previous", 1), ("personal", 2)):
        tensors = {
            f"{part}/{key}": t
            for part, whole in (("personal", PERSONAL.adapter), ("shared", PERSONAL.shared))
            for key, t in to_tensors(whole).items()
        }
        save_file(tensors, tmp_path / f"{name}.safetensors", {"base": BASE, "request": f"run:{number}"})
    assert [one.created for one in store.personal_versions()] == ["undated", "undated"]
    store.roll_back()
    assert [one and one.request for one in (store.personal(SITES),)] == ["run:1"]
    store.roll_back()
    assert [one and one.request for one in (store.personal(SITES),)] == ["run:2"]
    store.save_personal(PERSONAL._replace(request="run:3"), aside=True)
    store.save_personal(PERSONAL._replace(request="run:4"), aside=True)
    assert store.personal_versions()[0].is_current
    assert len(store.personal_versions()) == 4
    store.roll_back()
    store.roll_back()
    result = store.personal(SITES)
    assert result is not None
    assert result.request in ("run:1", "run:2")


def test_roll_back_of_undated_store(tmp_path: Path) -> None:
    store = Store(FileStorage(tmp_path))
    store.save_personal(PERSONAL._replace(request="run:1"))
    (tmp_path / "personal.safetensors").rename(tmp_path / "previous.safetensors")
    store.save_personal(PERSONAL._replace(request="run:2"))
    store.roll_back()
    result = store.personal(SITES)
    assert result is not None
    assert result.request == "run:1"


def test_damaged_adapter_is_not_listed(tmp_path: Path) -> None:
    store = Store(FileStorage(tmp_path))
    store.save_personal(PERSONAL._replace(request="run:1"))
    store.save_personal(PERSONAL._replace(request="run:2"), aside=True)
    (tmp_path / "personal.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "previous-2.safetensors").write_bytes(b"")
    assert len(store.personal_versions()) == 1
    store.roll_back()  # a damaged current adapter can always be rolled back
    result = store.personal(SITES)
    assert result is not None
    assert result.request == "run:1"


@pytest.mark.parametrize("length", [0, 9, 400, -1])
def test_damaged_personal_adapter_gives_one_line(tmp_path: Path, length: int) -> None:
    store, file = Store(FileStorage(tmp_path)), tmp_path / "personal.safetensors"
    store.save_personal(PERSONAL)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(AntherError, match="personalize again") as raised:
        store.personal(SITES)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "sites",
    [
        {},
        {"up.to_k": Site(3, 5)},
        SITES | {"more": Site(1, 1)},
        SITES | {"up.to_k": Site(3, 6)},
    ],
)
def test_adapter_for_other_sites_is_refused(tmp_path: Path, sites: dict[str, Site]) -> None:
    store = Store(FileStorage(tmp_path))
    store.save_personal(PERSONAL)
    with pytest.raises(AntherError, match="not a personal adapter for this base"):
        store.personal(sites)


def test_examples_are_cached_by_key(tmp_path: Path) -> None:
    store = Store(FileStorage(tmp_path))
    assert store.examples("train", "k") is None
    store.save_examples("train", "k", EXAMPLES)
    cached = Store(FileStorage(tmp_path)).examples("train", "k")
    assert cached is not None
    assert torch.equal(cached.latents, EXAMPLES.latents)
    assert torch.equal(cached.context, EXAMPLES.context)
    assert store.examples("train", "another") is None
    assert store.examples("validation", "k") is None
    store.save_examples("train", "another", EXAMPLES)  # the old examples don't stay on disk
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["train.safetensors"]


def test_losses_are_cached_by_key(tmp_path: Path) -> None:
    store = Store(FileStorage(tmp_path))
    assert store.number("base", "k") is None
    store.save_number("base", "k", 0.1)
    assert Store(FileStorage(tmp_path)).number("base", "k") == 0.1
    assert store.number("base", "another") is None


def test_damaged_caches_are_ignored(tmp_path: Path) -> None:
    store = Store(FileStorage(tmp_path))
    store.save_examples("train", "k", EXAMPLES)
    store.save_number("base", "k", 0.1)
    for file in (tmp_path / "cache").iterdir():
        for content in (b"", b"[]", b"{}", b"\xff" * 40, file.read_bytes()[:20]):
            file.write_bytes(content)
            assert store.examples("train", "k") is None or file.suffix == ".json"
            assert store.number("base", "k") is None or file.suffix == ".safetensors"
    store.save_examples("train", "k", EXAMPLES)
    store.save_number("base", "k", 0.2)
    assert store.examples("train", "k") is not None
    assert store.number("base", "k") == 0.2


def test_crash_while_writing_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(FileStorage(tmp_path))
    store.save_number("base", "k", 0.1)

    def full(_handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        store.save_number("base", "k", 0.2)
    assert store.number("base", "k") == 0.1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["base.json"]


def test_seed_is_drawn_once(tmp_path: Path) -> None:
    seed = Store(FileStorage(tmp_path / "a")).seed()
    assert Store(FileStorage(tmp_path / "a")).seed() == seed != Store(FileStorage(tmp_path / "b")).seed()
    assert (tmp_path / "a/seed").stat().st_mode & 0o077 == 0
    (tmp_path / "a/seed").write_text("x")
    with pytest.raises(AntherError, match="a new seed"):
        Store(FileStorage(tmp_path / "a")).seed()
