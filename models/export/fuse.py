"""Fuse an adapter into its base:  anther fuse BASE FILE --out DIR

The result is a copy of the pipeline's folder with the adapter's products added to its network's weights. Use it for
pipelines that can't load adapters, such as PixArt-Σ, and for tools that only read whole pipelines. In Python,
`fuse(pipe.transformer, FILE)` fuses in memory.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import REPORTED_ERRORS, AntherError, describe_error
from common.moved_commands import refuse_key_value
from common.plugins import allow_installed_plugins
from models.families.checkpoint import recognize
from models.files import assets
from models.quantization.packed import is_packed

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@torch.no_grad()
def fuse(network: nn.Module, file: Path | str, strength: float = 1.0) -> None:
    """Add an adapter to the weights of a diffusers network in place.

    Args:
        network: UNet or transformer.
        file: adapter in diffusers' layout, such as `adapters/shared.safetensors` of a run.
        strength: factor of the adapter's products.

    Raises:
        AntherError: the file isn't an adapter, or was made for another network.
    """
    tensors, _ = _read(Path(file))
    layers = dict(network.named_modules())
    for key, down in tensors.items():
        if not key.endswith(_DOWN):
            continue
        stem = key.removesuffix(_DOWN)
        layer, up = layers.get(stem.partition(".")[2]), tensors.get(stem + _UP)
        weight = getattr(layer, "weight", None)
        product = None if up is None else up.flatten(1).float() @ down.flatten(1).float()
        if weight is None or product is None or product.shape != weight.flatten(1).shape:
            raise AntherError(f"{file}: this network has no layer {stem}: fuse the adapter into its own base")
        weight += strength * product.view_as(weight).to(weight)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no mapping
            metadata = content.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise AntherError(f"{file}: can't be read ({' '.join(str(error).split())}): name an adapter's file") from error
    if not tensors or not all(name.endswith((_DOWN, _UP)) for name in tensors):
        raise AntherError(f"{file}: not an adapter in diffusers' layout: give the file without .kohya in its name")
    return tensors, metadata


def write_fused(base: str, adapter: Path, out: Path) -> str:
    """Write the base with a fused adapter to a new folder.

    Args:
        base: name, hash or folder.
        adapter: file in diffusers' layout.
        out: folder to create.

    Returns:
        The content hash of the result.

    Raises:
        AntherError: the base is missing or packed, the adapter belongs to another base, or `out` exists.
    """
    if out.exists():
        raise AntherError(f"out={out}: already exists: choose another folder")
    folder = assets.locate(base)
    checkpoint = recognize(folder)
    part = checkpoint.family.network
    if is_packed(folder / part):
        raise AntherError(f"base={base}: is packed: give the folder that it was packed from")
    _, metadata = _read(adapter)
    if (expected := metadata.get("anther_base")) and expected != (actual := assets.digest(folder)):
        raise AntherError(f"{adapter}: belongs to base {expected[:12]}, not to {actual[:12]}: name its own base")
    network = checkpoint.load(part)
    fuse(network, adapter)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fusing-") as scratch:
        partial = Path(scratch) / out.name
        shutil.copytree(folder, partial, ignore=lambda path, names: names if Path(path) == folder / part else [])
        network.save_pretrained(partial / part)
        partial.rename(out)
    return assets.digest(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2, with one line on standard error, if fusing fails."""
    parser = argparse.ArgumentParser(
        prog="anther fuse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="name or folder of the base, not packed")
    parser.add_argument("adapter", metavar="FILE", type=Path, help="adapter in diffusers' layout")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to create")
    words = sys.argv[1:] if arguments is None else arguments
    try:
        refuse_key_value(words, ("base", "adapter", "out"), "anther fuse BASE FILE --out DIR")
        options = parser.parse_args(words)
        out, adapter = options.out.expanduser(), options.adapter.expanduser()
        allow_installed_plugins()
        digest = write_fused(options.base, adapter, out)
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    print(f"{out}: fused {adapter}, base {digest[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
