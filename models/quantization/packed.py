"""A packed network: one safetensors file that is mapped into memory as it lies on the disk, and its manifest.

It takes the place of the weights in a pipeline's folder, so that a packed base is a folder like any other, known by the
same hash (`models.base.assets.digest`). Nothing is read before it is used, nothing is converted, and no float copy is made.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from common.errors import AntherError, summary
from models.base import assets, paging
from models.quantization.modes import WEIGHT_MODES, quantize_meta

FILE, MANIFEST, CONFIG = "packed.safetensors", "packed.json", "config.json"
FORMAT = 1

_AGAIN = "copy the packed base again, or pack it anew (anther pack)"
_MODULES = {"UNet2DConditionModel": "diffusers.models.unets.unet_2d_condition"}  # so that the others aren't imported


@dataclass(frozen=True, kw_only=True)
class PackedManifest:
    """What lies in a packed file, beside it as JSON."""

    format: int
    network: str  # class of diffusers
    weights: str  # mode, of `models.quantization.modes.WEIGHT_MODES`
    layers: dict[str, str]  # 'nf4' or 'int8' for each layer that is held in few bits
    source: str  # digest of the folder that was packed
    sha256: str  # of the file

    def save(self, folder: Path) -> None:
        """Write it beside the file."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> PackedManifest:
        """The manifest in a folder; AntherError if it is damaged, or of another version."""
        try:
            found = PackedManifest(**json.loads((folder / MANIFEST).read_text()))
            sound = found.format == FORMAT and found.weights in WEIGHT_MODES and isinstance(found.layers, dict)
        except (OSError, ValueError, TypeError) as error:
            raise AntherError(f"{folder / MANIFEST}: can't be read ({summary(error)}): {_AGAIN}") from error
        if not sound:
            raise AntherError(f"{folder / MANIFEST}: not of format {FORMAT}: {_AGAIN}")
        return found


def is_packed(folder: Path) -> bool:
    """Whether a network's folder holds a packed one."""
    return (folder / MANIFEST).exists()


def skeleton(folder: Path) -> nn.Module:
    """The network that a folder's config.json describes, its parameters on the meta device."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        kind = class_of(config["_class_name"])
        with _empty_parameters():
            network: nn.Module = kind.from_config(config)
    except Exception as error:  # a class that isn't there, or whatever it says of a foreign configuration
        raise AntherError(f"{folder / CONFIG}: describes no network of diffusers ({summary(error)})") from error
    return network


def class_of(name: str) -> Any:
    """The class of diffusers that a network is of."""
    return getattr(importlib.import_module(_MODULES.get(name, "diffusers.models")), name)


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Within this context modules are made without the data of their parameters.

    Buffers have theirs: some, such as PixArt's table of places, are in no file.
    """
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        plain(module, name, None if parameter is None else nn.Parameter(parameter.detach().to("meta")))

    nn.Module.register_parameter = register  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def load(folder: Path, network: str, weights: str = "fp32") -> nn.Module:
    """The packed network in a folder, its tensors mapped from the file.

    Args:
        network: the class that it must be.
        weights: the mode that was asked for; fp32 takes what is there.

    Raises:
        AntherError: it is of another class or mode, or not what was packed.
    """
    manifest, file = PackedManifest.read(folder), folder / FILE
    if manifest.network != network:
        raise AntherError(f"{folder}: a packed {manifest.network}, where the pipeline has a {network}: {_AGAIN}")
    if weights not in ("fp32", manifest.weights):
        raise AntherError(f"base.weights={weights}: the base was packed as {manifest.weights}: leave it out")
    if not file.is_file() or assets.digest(file) != manifest.sha256:
        raise AntherError(f"{file}: missing, or not the file that was packed: {_AGAIN}")
    made = skeleton(folder)
    try:
        quantize_meta(made, manifest.layers)
        with safe_open(file, "pt") as tensors:
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        paging.mark_mapped(state.values())
        for tensor in state.values():  # mapping a file brings pages of it in
            paging.release_pages(tensor, 0, tensor.numel())
        made.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError, AttributeError) as error:
        raise AntherError(f"{folder}: the file and its manifest don't agree ({summary(error)}): {_AGAIN}") from error
    return made.eval()
