"""Pack a base once, for everyone:  anther pack base=FOLDER weights=nf4 out=FOLDER

The result is a pipeline's folder like the one given, its network in few bits. Tensors go from file to file one by one,
so that packing takes no more memory than the largest of them beside Python's own, and the VAE, with which the result is
tried before it appears. It is known by its hash, as every base is, and is packed once and handed on: another processor
may round otherwise.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import REPORTED_ERRORS, AntherError, told
from models.base import assets, loading
from models.families.checkpoint import recognize
from models.quantization.blockwise import empty_quantized, quantize
from models.quantization.modes import WEIGHT_MODES, quant_types
from models.quantization.packed import FILE, FORMAT, PackedManifest, is_packed, skeleton

NETWORKS = ("unet", "transformer")
_TYPES = {torch.float32: "F32", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8"}
USAGE = "Pack a base once, for everyone:  anther pack base=FOLDER weights=nf4 out=FOLDER"
_CARDS = ("README.md", "LICENSE*", "*.license")


def pack(base: str, out: Path, weights: str) -> str:
    """Pack the base of that name or folder into a new folder; the hash of the result.

    Raises:
        AntherError: the base is missing, packed already, no pipeline with weights in safetensors, or one that couldn't
            be used.
    """
    if weights not in WEIGHT_MODES:
        raise AntherError(f"weights={weights}: must be one of: {', '.join(WEIGHT_MODES)}")
    if out.exists():
        raise AntherError(f"out={out}: is there already: choose another")
    source = assets.locate(base)
    part, parts = _parts(source)
    if is_packed(source / part):
        raise AntherError(f"base={base}: is packed already")
    whole = any((source / name).is_dir() for name in parts if name != part)  # a network alone is measured, not trained
    if whole:
        recognize(source).verify_encoders()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".packing-") as scratch:
        filling = Path(scratch) / out.name
        (filling / part).mkdir(parents=True)
        for name in parts:
            if name != part and (source / name).is_dir():
                shutil.copytree(source / name, filling / name)
        for file in (source / "model_index.json", *(card for cards in _CARDS for card in source.glob(cards))):
            shutil.copy2(file, filling)
        shutil.copy2(source / part / "config.json", filling / part)
        _pack_network(source / part, filling / part, weights, assets.digest(source))
        if whole:
            recognize(filling).verify_packed()
        filling.rename(out)
    return assets.digest(out)


def _parts(folder: Path) -> tuple[str, list[str]]:
    """Which part of a pipeline is the network, and what all parts are called."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        parts = [name for name, value in index.items() if isinstance(value, list)]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise AntherError(f"base {folder}: no model_index.json in it: give a pipeline's folder") from error
    for name in NETWORKS:
        if name in parts and (folder / name / "config.json").is_file():
            return name, parts
    raise AntherError(f"base {folder}: holds no {' or '.join(NETWORKS)}: copy the whole pipeline")


def _pack_network(source: Path, out: Path, weights: str, digest: str) -> None:
    network = skeleton(source)
    layers = quant_types(network, weights)
    tensors = _Source(source)
    if missing := sorted(network.state_dict().keys() - tensors.names):
        raise AntherError(f"base {source}: its safetensors files lack {missing[0]}: copy the whole pipeline")
    places, header = _places(network, layers)
    with (out / FILE).open("wb") as file:
        file.write(header)
        for name in network.state_dict():
            for key, tensor in _held(name, tensors.read(name), layers):
                file.seek(len(header) + places[key])
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    PackedManifest(
        format=FORMAT,
        network=type(network).__name__,
        weights=weights,
        layers=layers,
        source=digest,
        sha256=assets.digest(out / FILE),
    ).save(out)


def _held(name: str, tensor: Tensor, layers: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """How one tensor of the network is held, by the names of a packed network's state."""
    layer = name.removesuffix(".weight")
    if layer not in layers or layer == name:
        yield name, tensor.float() if tensor.is_floating_point() else tensor
        return
    for part, value in quantize(tensor, layers[layer])._asdict().items():
        yield f"{layer}.{part}", value


def _places(network: nn.Module, layers: dict[str, str]) -> tuple[dict[str, int], bytes]:
    """Where each tensor begins after the header, and the header.

    What is wider comes first, so that all are aligned; codes last, whose pages come and go, apart from those that stay.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in layers and layer != name:
            packed = empty_quantized(layers[layer], tensor.numel())
            held |= {f"{layer}.{part}": value for part, value in packed._asdict().items()}
        else:
            held[name] = tensor.float() if tensor.is_floating_point() else tensor
    places, entries, end = {}, {}, 0
    # else in the network's order
    for name, tensor in sorted(held.items(), key=lambda item: (-item[1].element_size(), item[0].endswith(".codes"))):
        places[name], start, end = end, end, end + tensor.nbytes
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return places, len(text).to_bytes(8, "little") + text


class _Source:
    """The tensors of a network's folder. Its files are opened anew for each, so that no page of them is kept."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in loading.find_weights(folder, loading.NETWORK).files:
            try:
                with safe_open(file, "pt") as tensors:
                    self._files |= dict.fromkeys(tensors.keys(), file)
            except (OSError, SafetensorError) as error:
                raise AntherError(f"{file}: can't be read ({error}): copy the pipeline again") from error

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
        if not loading.is_finite(found):
            raise AntherError(f"{self._files[name]}: {name} holds numbers that are not finite: get another copy")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 2, with one line on standard error, if the base can't be packed."""
    given = dict(argument.partition("=")[::2] for argument in (sys.argv[1:] if arguments is None else arguments))
    if given.keys() != {"base", "weights", "out"}:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        out = Path(given["out"]).expanduser()
        digest = pack(given["base"], out, given["weights"])
    except REPORTED_ERRORS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in out.glob(f"*/{FILE}"))
    print(f"{out}: {size / 1e6:.0f} MB of {given['weights']}, base {digest[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
