"""Adapters fused into their base's weights, loaded by diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import AntherError
from models.base.base import Base
from models.base.pack import pack
from models.export import adapter_files
from models.export.fuse import fuse, main
from models.export.layouts import export
from models.files import assets
from models.lora.adapter import Adapter
from tests.helpers.adapters import random_adapter


@pytest.fixture
def base(pipeline_folder: Path) -> Base:
    return Base(pipeline_folder, sites=r".*\.(to_q|conv1)")


@pytest.fixture
def adapter(base: Base, tmp_path: Path) -> Adapter:
    result = random_adapter(base.sites, 2)
    adapter_files.write(tmp_path, "a", result, base, "shared")
    return result


def arguments(base: Path, adapter: Path, out: Path) -> list[str]:
    return [str(base), str(adapter), "--out", str(out)]


def test_products_are_added_to_adapted_weights(
    pipeline_folder: Path, adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import UNet2DConditionModel

    out = tmp_path / "fused"
    assert main(arguments(pipeline_folder, tmp_path / "a.safetensors", out)) == 0
    assert assets.digest(out)[:12] in capsys.readouterr().out
    before = UNet2DConditionModel.from_pretrained(pipeline_folder, subfolder="unet").state_dict()
    after = UNet2DConditionModel.from_pretrained(out, subfolder="unet").state_dict()
    for name, weight in before.items():
        factors = adapter.get(name.removesuffix(".weight"))
        product = 0 if factors is None else (factors.b @ factors.a).view_as(weight)
        torch.testing.assert_close(after[name], weight + product)
    assert Base(out).hash != Base(pipeline_folder).hash
    assert not any(tmp_path.glob(".fusing*"))


def test_strength_scales(pipeline_folder: Path, adapter: Adapter, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(pipeline_folder, subfolder="unet")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fuse(network, tmp_path / "a.safetensors", strength=-0.5)
    for name, (a, b) in adapter.items():
        change = network.state_dict()[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(change, -0.5 * (b @ a).view_as(change), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("adapter")
class TestFuseErrors:
    def refuse(self, given: list[str], output: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(given) == 2
        error = capsys.readouterr().err
        assert output in error
        assert error.count("\n") == 1

    def test_kohya_layout(self, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        given = arguments(pipeline_folder, tmp_path / "a.kohya.safetensors", tmp_path / "out")
        self.refuse(given, "without .kohya in its name", capsys)

    def test_not_an_adapter(self, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
        self.refuse(arguments(pipeline_folder, tmp_path / "x.safetensors", tmp_path / "o"), "not an adapter", capsys)
        (tmp_path / "x.safetensors").write_text("nothing")
        self.refuse(arguments(pipeline_folder, tmp_path / "x.safetensors", tmp_path / "o"), "can't be read", capsys)
        self.refuse(arguments(pipeline_folder, tmp_path / "y.safetensors", tmp_path / "o"), "can't be read", capsys)

    def test_another_base(self, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        other = Path(shutil.copytree(pipeline_folder, tmp_path / "other"))
        (other / "extra.json").write_text("{}")
        self.refuse(arguments(other, tmp_path / "a.safetensors", tmp_path / "o"), "belongs to base", capsys)

    def test_packed_base(self, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pack(str(pipeline_folder), tmp_path / "packed", "int8")
        given = arguments(tmp_path / "packed", tmp_path / "a.safetensors", tmp_path / "o")
        self.refuse(given, "the folder that it was packed from", capsys)

    def test_arguments(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.refuse(["base=x"], "base=x: write anther fuse BASE FILE --out DIR", capsys)
        self.refuse(arguments(tmp_path, tmp_path / "a", tmp_path), "already exists", capsys)

    def test_another_network(self, base: Base, pipeline_folder: Path, tmp_path: Path) -> None:
        from diffusers import UNet2DConditionModel

        network = UNet2DConditionModel.from_pretrained(pipeline_folder, subfolder="unet")
        sites = {"no.such": next(iter(base.sites.values()))}
        export(random_adapter(sites, 1), tmp_path / "b.safetensors", family=base.family, sites=sites)
        with pytest.raises(AntherError, match=r"no layer unet\.no\.such"):
            fuse(network, tmp_path / "b.safetensors")
