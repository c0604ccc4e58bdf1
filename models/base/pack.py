"""Quantize a base once and store it:  anther pack BASE --weights nf4 --out DIR

The result is a pipeline folder like the input, with a quantized network. Tensors are copied one by one, so that packing
needs memory for the largest tensor, for Python, and for the VAE, which is loaded to verify the result before the folder
gets its final name. A packed base is identified by its hash, as every base is, and should be packed once and
distributed: another processor may round differently.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import REPORTED_ERRORS, AntherError, describe_error
from common.moved_commands import refuse_key_value
from common.plugins import allow_installed_plugins
from models.families.checkpoint import recognize
from models.files import assets, loading
from models.quantization.blockwise import empty_quantized, quantize
from models.quantization.modes import WEIGHT_MODES, quant_types
from models.quantization.packed import FILE, FORMAT, PackedManifest, is_packed, skeleton

NETWORKS = ("unet", "transformer")
_TYPES = {torch.float32: "F32", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8"}
USAGE = "anther pack BASE --weights nf4 --out DIR"
_CARDS = ("README.md", "LICENSE*", "*.license")


def pack(base: str, out: Path, weights: str) -> str:
    """Pack a base into a new folder.

    Args:
        base: name, hash or folder.
        out: folder to create.
        weights: one of `WEIGHT_MODES`.

    Returns:
        The content hash of the result.

    Raises:
        AntherError: the base is missing, already packed, has no safetensors, or can't be used; or `out` exists.
    """
    if weights not in WEIGHT_MODES:
        raise AntherError(f"weights={weights}: must be one of: {', '.join(WEIGHT_MODES)}")
    if out.exists():
        raise AntherError(f"out={out}: already exists: choose another folder")
    source = assets.locate(base)
    part, parts = _parts(source)
    if is_packed(source / part):
        raise AntherError(f"base={base}: is already packed")
    complete = any((source / name).is_dir() for name in parts if name != part)  # benchmarks pack a network by itself
    if complete:
        recognize(source).verify_encoders()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".packing-") as scratch:
        partial = Path(scratch) / out.name
        (partial / part).mkdir(parents=True)
        for name in parts:
            if name != part and (source / name).is_dir():
                shutil.copytree(source / name, partial / name)
        for file in (source / "model_index.json", *(card for cards in _CARDS for card in source.glob(cards))):
            shutil.copy2(file, partial)
        shutil.copy2(source / part / "config.json", partial / part)
        _pack_network(source / part, partial / part, weights, assets.digest(source))
        if complete:
            recognize(partial).verify_packed()
        partial.rename(out)
    return assets.digest(out)


def _parts(folder: Path) -> tuple[str, list[str]]:
    """Return the name of a pipeline's network, and the names of all parts."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        parts = [name for name, value in index.items() if isinstance(value, list)]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise AntherError(f"base {folder}: no model_index.json in it: name a pipeline's folder") from error
    for name in NETWORKS:
        if name in parts and (folder / name / "config.json").is_file():
            return name, parts
    raise AntherError(f"base {folder}: holds no {' or '.join(NETWORKS)}: copy the whole pipeline")


def _pack_network(source: Path, out: Path, weights: str, digest: str) -> None:
    network = skeleton(source)
    layers = quant_types(network, weights)
    tensors = _TensorReader(source)
    if missing := sorted(network.state_dict().keys() - tensors.names):
        raise AntherError(f"base {source}: its safetensors files lack {missing[0]}: copy the whole pipeline")
    offsets, header = _layout(network, layers)
    with (out / FILE).open("wb") as file:
        file.write(header)
        for name in network.state_dict():
            for key, tensor in _quantized(name, tensors.read(name), layers):
                file.seek(len(header) + offsets[key])
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    PackedManifest(
        format=FORMAT,
        network=type(network).__name__,
        weights=weights,
        layers=layers,
        source=digest,
        sha256=assets.digest(out / FILE),
    ).save(out)


def _quantized(name: str, tensor: Tensor, layers: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that store one tensor of the network, by their names in the packed state dict."""
    layer = name.removesuffix(".weight")
    if layer not in layers or layer == name:
        yield name, tensor.float() if tensor.is_floating_point() else tensor
        return
    for part, value in quantize(tensor, layers[layer])._asdict().items():
        yield f"{layer}.{part}", value


def _layout(network: nn.Module, layers: dict[str, str]) -> tuple[dict[str, int], bytes]:
    """Return each tensor's offset after the header, and the safetensors header.

    Wider dtypes come first, so that all tensors are aligned. Codes come last, apart from the resident tensors, because
    their pages are released after use.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in layers and layer != name:
            packed = empty_quantized(layers[layer], tensor.numel())
            stored |= {f"{layer}.{part}": value for part, value in packed._asdict().items()}
        else:
            stored[name] = tensor.float() if tensor.is_floating_point() else tensor
    offsets, entries, end = {}, {}, 0
    # otherwise in the network's order
    for name, tensor in sorted(stored.items(), key=lambda item: (-item[1].element_size(), item[0].endswith(".codes"))):
        offsets[name], start, end = end, end, end + tensor.nbytes
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return offsets, len(text).to_bytes(8, "little") + text


class _TensorReader:
    """Reader of tensors in a network's folder. Files are reopened for each tensor, so that no pages stay in memory."""

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
            tensor: Tensor = tensors.get_tensor(name)
        if not loading.is_finite(tensor):
            raise AntherError(f"{self._files[name]}: {name} holds numbers that are not finite: get another copy")
        return tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2, with one line on standard error, if the base can't be packed."""
    parser = argparse.ArgumentParser(
        prog="anther pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="name or folder of the base")
    parser.add_argument("--weights", required=True, choices=WEIGHT_MODES, help="format of the packed weights")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to create")
    words = sys.argv[1:] if arguments is None else arguments
    try:
        refuse_key_value(words, ("base", "weights", "out"), USAGE)
        options = parser.parse_args(words)
        out = options.out.expanduser()
        allow_installed_plugins()
        digest = pack(options.base, out, options.weights)
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in out.glob(f"*/{FILE}"))
    print(f"{out}: {size / 1e6:.0f} MB, weights={options.weights}, base {digest[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
