"""The benchmark of exports: it notices a lost α, a wrong row and a missing name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.interop import export
from bench.interop.export import RANK, TOLERANCE, largest_difference, open_checkouts, random_adapter, write
from bench.interop.networks import Place, SmallNetwork, original_weights
from bench.interop.tools import Loaded, module_name
from common.errors import AntherError
from models.families.flux import FLUX
from models.lora.adapter import Site

QKV = {f"transformer_blocks.0.attn.to_{each}": Site(6, 8) for each in "qkv"}
NETWORK = SmallNetwork(name="flux", family=FLUX, config={}, sites=QKV)
KEY = "double_blocks.0.img_attn.qkv.weight"
WHERE = {site: Place(KEY, (8 * index, 8)) for index, site in enumerate(QKV)}


class FakeTool:
    """A loader that applies α and can make mistakes."""

    name, layouts = "fake", ("kohya",)

    def __init__(self, mistake: str = "") -> None:
        self.mistake = mistake

    def load(self, file: Path, _: SmallNetwork, weights: Mapping[str, Tensor]) -> Loaded:
        tensors, stem = load_file(file), module_name(KEY)
        down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        scale = 1.0 if self.mistake == "α" else float(tensors[f"{stem}.alpha"]) / len(down)
        change = scale * up @ down
        assert change.shape == weights[KEY].shape
        if self.mistake == "rows":
            change = change.roll(8, 0)
        return Loaded({} if self.mistake == "name" else {KEY: change}, ())


@pytest.mark.parametrize("mistake", ["", "α", "rows", "name"])
def test_mistakes_of_a_loader_are_differences(mistake: str, tmp_path: Path) -> None:
    adapter = random_adapter(QKV)
    expected = original_weights(adapter, NETWORK, WHERE)
    write(tmp_path / "a.safetensors", adapter, QKV, NETWORK, "kohya")
    loaded = FakeTool(mistake).load(tmp_path / "a.safetensors", NETWORK, expected)
    difference = largest_difference(loaded.changes, expected)
    assert (difference > 0.1) == bool(mistake)
    assert mistake or difference < TOLERANCE


def test_ranks_differ() -> None:
    assert {len(factors.a) for factors in random_adapter(QKV).values()} == set(range(1, RANK + 1))


def test_converted_places() -> None:
    where = {site: place._replace(convert=lambda weight: -weight) for site, place in WHERE.items()}
    adapter = random_adapter(QKV)
    plain, converted = (original_weights(adapter, NETWORK, each)[KEY] for each in (WHERE, where))
    assert torch.equal(converted, -plain)


def test_arguments(tmp_path: Path) -> None:
    for words, message in (
        (["folder"], "write anther bench export"),
        ([f"checkout={tmp_path}"], "not a checkout of"),
    ):
        with pytest.raises(AntherError, match=message):
            open_checkouts(words)
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks/lora_flux.py").touch()
    with pytest.raises(AntherError, match="its commit is unknown"):
        open_checkouts([f"checkout={tmp_path}"])


def test_tables_are_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").touch()
    monkeypatch.setattr(export, "TOOLS", {"one": lambda _: SimpleNamespace()})
    with pytest.raises(AntherError, match="ComfyUI or Forge too"):
        open_checkouts([f"checkout={tmp_path}@abc"])


def test_recorded_results() -> None:
    """Every supported file is read without loss, up to the layers that sd-scripts is known to ignore."""
    recorded = json.loads(export.OUT.read_text())
    assert recorded["commits"].keys() == {"ComfyUI", "Forge", "sd-scripts"}
    for result in recorded["results"]:
        if not result["supported"]:
            continue
        assert result["largest_relative_difference"] <= TOLERANCE
        layers = {name.partition(".")[0] for name in result["unread"]}
        assert len(layers) == (0 if result["tool"] != "sd-scripts" else EXPECTED.get(result["network"], 0)), result


EXPECTED = {"stable_diffusion": 4, "stable_diffusion_2": 4, "flux": 2, "flux_schnell": 2}
"""Layers that sd-scripts ignores: ends and time embedding of UNets, the last layer of Flux."""
