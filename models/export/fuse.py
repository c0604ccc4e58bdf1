"""Fuse an adapter into its base:  python -m models.export.fuse base=FOLDER adapter=FILE out=FOLDER

The result is a copy of the pipeline's folder, with the adapter's products added to its network's weights. Use it for
pipelines that can't load adapters, such as PixArt-Σ's, and for tools that only read whole pipelines. From Python,
`fuse(pipe.transformer, FILE)` fuses in memory.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import AntherError
from models.base import assets
from models.families.checkpoint import recognize
from models.quantization.packed import is_packed

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@torch.no_grad()
def fuse(network: nn.Module, file: Path | str, strength: float = 1.0) -> None:
    """Add an adapter to the weights of a network of diffusers, in place.

    Args:
        file: an adapter in diffusers' layout, such as `adapters/shared.safetensors` of a run.
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
            raise AntherError(f"{file}: {stem} is no layer of this network: fuse it into the base that it was made for")
        weight += strength * product.view_as(weight).to(weight)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no mapping
            told = content.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise AntherError(f"{file}: can't be read ({' '.join(str(error).split())}): name an adapter's file") from error
    if not tensors or not all(name.endswith((_DOWN, _UP)) for name in tensors):
        raise AntherError(f"{file}: not an adapter in diffusers' layout: give the file without .kohya in its name")
    return tensors, told


def fused(base: str, adapter: Path, out: Path) -> str:
    """Write the base with the adapter fused into its weights to a new folder, and return the hash of the result.

    Raises:
        AntherError: the base is missing or packed, the adapter is of another base, or `out` is there already.
    """
    if out.exists():
        raise AntherError(f"out={out}: is there already: choose another")
    folder = assets.locate(base)
    checkpoint = recognize(folder)
    part = checkpoint.family.network
    if is_packed(folder / part):
        raise AntherError(f"base={base}: is packed: give the folder that it was packed from")
    _, told = _read(adapter)
    if (wanted := told.get("anther_base")) and wanted != (found := assets.digest(folder)):
        raise AntherError(
            f"{adapter}: belongs to another base ({wanted[:12]}), this one is {found[:12]}: name that one"
        )
    network = checkpoint.load(part)
    fuse(network, adapter)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fusing-") as scratch:
        filling = Path(scratch) / out.name
        shutil.copytree(folder, filling, ignore=lambda at, names: names if Path(at) == folder / part else [])
        network.save_pretrained(filling / part)
        filling.rename(out)
    return assets.digest(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 2, with one line on standard error, if fusing fails."""
    given = dict(argument.partition("=")[::2] for argument in (sys.argv[1:] if arguments is None else arguments))
    if given.keys() != {"base", "adapter", "out"}:
        print(
            (__doc__ or "python -m models.export.fuse base=FOLDER adapter=FILE out=FOLDER").splitlines()[0],
            file=sys.stderr,
        )
        return 2
    try:
        out = Path(given["out"]).expanduser()
        digest = fused(given["base"], Path(given["adapter"]).expanduser(), out)
    except AntherError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"out={out}: can't be written ({error.strerror}): choose another folder", file=sys.stderr)
        return 2
    print(f"{out}: {given['adapter']} is in its weights, base {digest[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
