"""Pack a base, and compare it with one that is quantized on load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.lib.tiny import ATTENTION, as_variant, save_pipeline
from common.errors import AntherError
from models.base.base import Base
from models.base.pack import main, pack
from models.files import assets
from models.quantization.layers import QuantizedLayer
from models.quantization.modes import quant_types
from models.quantization.packed import FILE, MANIFEST, PackedManifest, load, skeleton

NETWORK = "UNet2DConditionModel"


@pytest.fixture(scope="module")
def packed_folder(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "base"
    assert pack(str(pipeline_folder), out, "mixed") == assets.digest(out)
    return out


@pytest.fixture
def folder(packed_folder: Path, tmp_path: Path) -> Path:
    """Copy the packed base, for tests that damage it."""
    return Path(shutil.copytree(packed_folder, tmp_path / "copy"))


def output(base: Base) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, *base.shape, generator=generator), torch.randn(2, 8, 16, generator=generator)
    with base.use_adapters([]) as denoise, torch.no_grad():
        return denoise(x, torch.tensor([10, 700]), context)


@pytest.mark.integration
@pytest.mark.parametrize("weights", ["fp32", "int8", "mixed", "nf4"])
def test_packed_equals_quantized_on_load(pipeline_folder: Path, tmp_path: Path, weights: str) -> None:
    pack(str(pipeline_folder), tmp_path / "base", weights)
    packed_base = Base(tmp_path / "base", sites=ATTENTION)
    loaded_base = Base(pipeline_folder, sites=ATTENTION, weights=weights)
    assert torch.equal(output(packed_base), output(loaded_base))
    assert (list(packed_base.sites.items()), packed_base.shape) == (list(loaded_base.sites.items()), loaded_base.shape)
    state = loaded_base.network.state_dict()
    assert packed_base.network.state_dict().keys() == state.keys()
    for name, tensor in packed_base.network.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert not any(value.requires_grad for value in packed_base.network.parameters())


@pytest.mark.integration
def test_packed_base_encodes_and_decodes(packed_folder: Path, base: Base) -> None:
    packed_base = Base(packed_folder, sites=ATTENTION, weights="mixed")
    assert torch.equal(packed_base.encode_captions(["a b"]), base.encode_captions(["a b"]))
    latents = torch.randn(1, *base.shape)
    assert (packed_base.decode(latents) == base.decode(latents)).all()


def test_file_matches_manifest(packed_folder: Path, pipeline_folder: Path) -> None:
    manifest, tensors = PackedManifest.read(packed_folder / "unet"), load_file(packed_folder / "unet" / FILE)
    network = skeleton(pipeline_folder / "unet")
    assert manifest.layers == quant_types(network, "mixed") != {}
    assert manifest.source == assets.digest(pipeline_folder)
    assert (manifest.network, manifest.weights) == (NETWORK, "mixed")
    expected = {name for name in network.state_dict() if name.removesuffix(".weight") not in manifest.layers}
    expected |= {f"{layer}.{part}" for layer in manifest.layers for part in ("codes", "scales", "top")}
    assert tensors.keys() == expected
    assert all(file.suffix != ".safetensors" or file.name == FILE for file in (packed_folder / "unet").iterdir())


def test_tensors_are_memory_mapped(packed_folder: Path) -> None:
    network = load(packed_folder / "unet", NETWORK)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(FILE)]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    tensors = [*network.parameters(), *network.buffers()]
    assert all(any(start <= tensor.data_ptr() < end for start, end in ranges) for tensor in tensors)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors)


def test_network_without_other_parts(pipeline_folder: Path, tmp_path: Path) -> None:
    """The network is the only part in the folder."""
    for name in ("unet", "model_index.json"):
        (shutil.copytree if name == "unet" else shutil.copy)(pipeline_folder / name, (tmp_path / "one") / name)
    pack(str(tmp_path / "one"), tmp_path / "packed", "int8")
    assert load(tmp_path / "packed" / "unet", NETWORK)


@pytest.mark.integration
@pytest.mark.parametrize("sharded", [False, True])
def test_sharded_half_precision_weights(pipeline_folder: Path, tmp_path: Path, sharded: bool) -> None:
    source = Path(shutil.copytree(pipeline_folder, tmp_path / "source"))
    weights = source / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(weights).items()}
    weights.unlink()
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(other, weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))  # must be ignored
    if sharded:
        save_file(other, weights)
        files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(tensors)}
        for file in {*files.values()}:
            save_file({name: tensors[name] for name in tensors if files[name] == file}, weights.with_name(file))
        index = weights.with_name("diffusion_pytorch_model.safetensors.index.json")
        index.write_text(json.dumps({"weight_map": files}))
    else:
        save_file(tensors, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    pack(str(source), tmp_path / "packed", "nf4")
    network = load(tmp_path / "packed" / "unet", NETWORK)
    for name, tensor in network.state_dict().items():
        if name in tensors:
            assert torch.equal(tensor, tensors[name].float())
    assert sum(isinstance(layer, QuantizedLayer) for layer in network.modules()) > 10


@pytest.mark.integration
def test_command(pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "packed"
    arguments = [str(pipeline_folder), "--weights", "int8", "--out", str(out)]
    assert main(arguments) == 0
    assert assets.digest(out)[:12] in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["packed"]
    for wrong in (
        arguments,
        ["nowhere", *arguments[1:4], "other"],
        [f"base={pipeline_folder}", "weights=int8", "out=o"],
    ):
        assert main(wrong) == 2
        captured = capsys.readouterr()
        assert (len(captured.err.splitlines()), captured.out) == (1, "")
    assert captured.err.endswith("write anther pack BASE --weights nf4 --out DIR\n")
    for wrong in ([], arguments[:3], [*arguments, "--more"], [arguments[0], "--weights", "int4", *arguments[3:]]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)


@pytest.mark.integration
@pytest.mark.parametrize("sharded", [False, True])
def test_variant_folder(pipeline_folder: Path, tmp_path: Path, sharded: bool) -> None:
    """The packed base loads and encodes as before."""
    source = as_variant(Path(shutil.copytree(pipeline_folder, tmp_path / "source")), sharded=sharded)
    pack(str(source), tmp_path / "packed", "fp32")
    packed_base, loaded_base = Base(tmp_path / "packed", sites=ATTENTION), Base(pipeline_folder, sites=ATTENTION)
    assert torch.equal(output(packed_base), output(loaded_base))
    assert torch.equal(packed_base.encode_captions(["a b"]), loaded_base.encode_captions(["a b"]))
    assert torch.equal(output(Base(source, sites=ATTENTION)), output(loaded_base))


@pytest.mark.integration
def test_unusable_bases_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    for i, (spoil, match) in enumerate(
        [
            (lambda copy: replace_by_pickle(copy / "text_encoder/model.safetensors"), "pickled weights are never read"),
            (lambda copy: (copy / "tokenizer/tokenizer.json").unlink(), "has no vocabulary"),
            (lambda copy: drop_weight(copy / "text_encoder/model.safetensors"), "lacks 1 of the weights"),
            (lambda copy: drop_weight(copy / "vae/diffusion_pytorch_model.safetensors"), "lacks 1 of the weights"),
            (lambda copy: insert_nan(copy / "unet/diffusion_pytorch_model.safetensors"), "not finite"),
        ]
    ):
        copy = Path(shutil.copytree(pipeline_folder, tmp_path / str(i)))
        spoil(copy)
        with pytest.raises(AntherError, match=match):
            pack(str(copy), tmp_path / "out", "int8")
        assert {path.name for path in tmp_path.iterdir()} == {str(one) for one in range(i + 1)}


def replace_by_pickle(file: Path) -> None:
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def drop_weight(file: Path) -> None:
    tensors = load_file(file)
    del tensors[next(name for name in sorted(tensors) if name.endswith(("fc1.weight", "conv_in.weight")))]
    save_file(tensors, file, metadata={"format": "pt"})


def insert_nan(file: Path) -> None:
    tensors = load_file(file)
    tensors["conv_in.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


class TestPackErrors:
    """Each error is one clear line."""

    def refuse(self, match: str, action: Callable[[], object]) -> None:
        with pytest.raises(AntherError, match=match) as refusal:
            action()
        assert "\n" not in str(refusal.value)

    def refuse_base(self, folder: Path, match: str, weights: str = "fp32") -> None:
        self.refuse(match, lambda: Base(folder, sites=ATTENTION, weights=weights))

    def test_truncated_or_changed(self, folder: Path) -> None:
        file = folder / "unet" / FILE
        content = file.read_bytes()
        for damaged in (content[:-1], content[:100], b"", content[:-1] + bytes([content[-1] ^ 1])):
            file.write_bytes(damaged)
            self.refuse_base(folder, "not the file that was packed")
        file.unlink()
        self.refuse_base(folder, "missing")

    def test_another_mode(self, folder: Path) -> None:
        self.refuse_base(folder, "packed as mixed", weights="nf4")

    def test_another_class(self, folder: Path) -> None:
        self.refuse("packed UNet2DConditionModel", lambda: load(folder / "unet", "FluxTransformer2DModel"))

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}'])
    def test_damaged_manifest(self, folder: Path, text: str) -> None:
        (folder / "unet" / MANIFEST).write_text(text)
        self.refuse_base(folder, "can't be read")

    @pytest.mark.parametrize(("key", "value"), [("format", 2), ("weights", "int3"), ("layers", [])])
    def test_manifest_of_another_version(self, folder: Path, key: str, value: object) -> None:
        manifest = folder / "unet" / MANIFEST
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {key: value}))
        self.refuse_base(folder, "not format 1")

    @pytest.mark.parametrize("change", ["less", "more", "other", "absent"])
    def test_inconsistent_manifest(self, folder: Path, change: str) -> None:
        manifest = folder / "unet" / MANIFEST
        result = json.loads(manifest.read_text())
        layer = next(iter(result["layers"]))
        match change:
            case "less":
                del result["layers"][layer]
            case "more":
                result["layers"]["conv_in"] = "int8"
            case "other":
                result["layers"][layer] = "nf4" if result["layers"][layer] == "int8" else "int8"
            case "absent":
                result["layers"]["nowhere"] = "int8"
        manifest.write_text(json.dumps(result))
        self.refuse_base(folder, "the file and its manifest differ")

    def test_configuration_of_another_network(self, folder: Path) -> None:
        config = folder / "unet" / "config.json"
        result = json.loads(config.read_text())
        config.write_text(json.dumps(result | {"block_out_channels": [16, 64]}))
        self.refuse_base(folder, "the file and its manifest differ")
        config.write_text(json.dumps(result | {"_class_name": "Nothing"}))
        self.refuse_base(folder, "describes no diffusers network")

    def test_unpackable_sources(self, packed_folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        self.refuse("no such folder", lambda: pack("/nowhere", out, "nf4"))
        self.refuse("already packed", lambda: pack(str(packed_folder), out, "nf4"))
        self.refuse("already exists", lambda: pack(str(packed_folder), packed_folder, "nf4"))
        (tmp_path / "empty").mkdir()
        self.refuse("no model_index.json", lambda: pack(str(tmp_path / "empty"), out, "nf4"))

    def test_source_with_invalid_weights(self, tmp_path: Path) -> None:
        source, out = save_pipeline(tmp_path), tmp_path / "out"
        weights = source / "unet" / "diffusion_pytorch_model.safetensors"
        tensors, content = load_file(weights), weights.read_bytes()
        weights.write_bytes(content[:-5])
        self.refuse("can't be read", lambda: pack(str(source), out, "nf4"))
        del tensors["conv_in.bias"]
        save_file(tensors, weights)
        self.refuse("lack conv_in.bias", lambda: pack(str(source), out, "nf4"))
        torch.save(tensors, weights.with_suffix(".bin"))
        weights.unlink()
        self.refuse("pickled weights are never read", lambda: pack(str(source), out, "nf4"))
        shutil.rmtree(source / "unet")
        self.refuse("holds no unet", lambda: pack(str(source), out, "nf4"))
        assert not out.exists()
