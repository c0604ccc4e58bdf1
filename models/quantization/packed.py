"""A packed network: a memory-mapped safetensors file with quantized weights, and its manifest.

It replaces the weights in a pipeline's folder, so that a packed base is a folder like any other, identified by the same
hash (`models.files.assets.digest`). Nothing is read before it is used, converted, or copied to floating point.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from common.errors import AntherError, summary
from models.files import assets, paging
from models.files.diffusers_classes import diffusers_class
from models.quantization.modes import WEIGHT_MODES, quantize_meta

FILE, MANIFEST, CONFIG = "packed.safetensors", "packed.json", "config.json"
FORMAT = 1

_AGAIN = "copy the packed base again, or run anther pack again"


@dataclass(frozen=True, kw_only=True)
class PackedManifest:
    """Description of a packed file, stored next to it as JSON."""

    format: int
    network: str  # class in diffusers
    weights: str  # one of `models.quantization.modes.WEIGHT_MODES`
    layers: dict[str, str]  # 'nf4' or 'int8' for each quantized layer
    source: str  # digest of the folder that was packed
    sha256: str  # of the file

    def save(self, folder: Path) -> None:
        """Write the manifest to the network's folder."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> PackedManifest:
        """Read the manifest in a folder; AntherError if it is damaged or of another version."""
        try:
            manifest = PackedManifest(**json.loads((folder / MANIFEST).read_text()))
            valid = manifest.format == FORMAT and manifest.weights in WEIGHT_MODES and isinstance(manifest.layers, dict)
        except (OSError, ValueError, TypeError) as error:
            raise AntherError(f"{folder / MANIFEST}: can't be read ({summary(error)}): {_AGAIN}") from error
        if not valid:
            raise AntherError(f"{folder / MANIFEST}: not format {FORMAT}: {_AGAIN}")
        return manifest


def is_packed(folder: Path) -> bool:
    """Return whether a network's folder holds a packed one."""
    return (folder / MANIFEST).exists()


def skeleton(folder: Path) -> nn.Module:
    """Build the network that a folder's config.json describes, with parameters on the meta device."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        kind = class_of(config["_class_name"])
        with _empty_parameters():
            network: nn.Module = kind.from_config(config)
    except Exception as error:  # an unknown class, or any error that it raises for a foreign configuration
        raise AntherError(f"{folder / CONFIG}: describes no diffusers network ({summary(error)})") from error
    return network


def class_of(name: str) -> Any:
    """Return the diffusers network of this name."""
    return diffusers_class(name, "diffusers.models")


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Build modules without allocating parameters within this context.

    Buffers are allocated: some, such as PixArt's position table, aren't in any file.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, None if parameter is None else nn.Parameter(parameter.detach().to("meta")))

    nn.Module.register_parameter = register  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def load(folder: Path, network: str, weights: str = "fp32") -> nn.Module:
    """Load the packed network in a folder, its tensors mapped from the file.

    Args:
        folder: folder of the network.
        network: expected class in diffusers.
        weights: requested mode; fp32 accepts any.

    Raises:
        AntherError: it has another class or mode, or is not the file that was packed.
    """
    manifest, file = PackedManifest.read(folder), folder / FILE
    if manifest.network != network:
        raise AntherError(f"{folder}: a packed {manifest.network}, but the pipeline has a {network}: {_AGAIN}")
    if weights not in ("fp32", manifest.weights):
        raise AntherError(f"base.weights={weights}: the base was packed as {manifest.weights}: remove base.weights")
    if not file.is_file() or assets.digest(file) != manifest.sha256:
        raise AntherError(f"{file}: missing, or not the file that was packed: {_AGAIN}")
    module = skeleton(folder)
    try:
        quantize_meta(module, manifest.layers)
        with safe_open(file, "pt") as tensors:
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        paging.mark_mapped(state.values())
        for tensor in state.values():  # mapping a file reads pages of it
            paging.release_pages(tensor, 0, tensor.numel())
        module.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError, AttributeError) as error:
        raise AntherError(f"{folder}: the file and its manifest differ ({summary(error)}): {_AGAIN}") from error
    return module.eval()
