"""Read a LoRA file of another tool as plain factors, before its layers are known.

diffusers, peft    unet.<layer>.lora_A.weight, ….lora_B.weight; the scale is in the header, else 1
older diffusers    unet.<layer>.lora.down.weight, <layer>.processor.to_q_lora.down.weight
kohya              lora_unet_<layer>.lora_down.weight, ….lora_up.weight, ….alpha
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import AntherError, shorten, summary

_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
_OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"hada_w\d": "LoHa",
    r"lokr_w\d": "LoKr",
    r"lora_mid": "LoCon with a middle factor",
    r"oft_|boft_": "OFT",
    r"\.diff(_b)?$|lora_B\.bias|lora_up\.bias": "LoRA with biases or whole weights",
}
_TEXT_ENCODER = re.compile(r"(lora_te\d?_|(base_model\.model\.)?text_encoders?(_\d)?\.|te\d?\.).*")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")


class LoraModule(NamedTuple):
    """Factors of one layer, with the scale α/r in `up`."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """Shapes of both factors in the file."""


class LoraFile(NamedTuple):
    """Content of a LoRA file."""

    modules: Mapping[str, LoraModule]
    """By the name of the layer in the file."""
    text_encoder_tensors: int
    """Number of tensors for text encoders, which are not read."""
    metadata: Mapping[str, str]


def read_lora_file(file: Path) -> LoraFile:
    """Read the factors of a safetensors file in float32.

    Raises:
        AntherError: the file is missing, damaged, pickled, not a LoRA, or only for text encoders.
    """
    tensors, metadata = _read(file)
    names = [name for name in tensors if not _TEXT_ENCODER.fullmatch(name)]
    for pattern, kind in _OTHER_KINDS.items():
        if found := next((name for name in names if re.search(pattern, name)), None):
            raise AntherError(f"{file}: is a {kind} ({shorten(found)}): only LoRA, a product of two factors, is read")
    modules, used = {}, set()
    scales = _Scales(file, metadata)
    for stem, down_name, up_name in _pairs(names):
        if up_name not in tensors:
            raise AntherError(f"{file}: {shorten(down_name)} has no {up_name.rpartition('.lora')[2]}: copy it again")
        down, up = tensors[down_name].float(), tensors[up_name].float()
        alpha = tensors.get(f"{stem}.alpha")
        used |= {down_name, up_name, f"{stem}.alpha"}
        modules[stem] = _module(file, stem, down, up, scales.of(stem, len(down), alpha))
    if unknown := [name for name in names if name not in used]:
        what = "not a LoRA" if not modules else f"has {len(unknown)} tensors that no LoRA has"
        raise AntherError(f"{file}: {what} ({shorten(unknown[0])}): name a LoRA in diffusers' or kohya's layout")
    if not modules:
        only = "only adapts text encoders" if tensors else "is empty"
        raise AntherError(f"{file}: {only}: a LoRA of the network (UNet or transformer) is needed")
    return LoraFile(modules, len(tensors) - len(names), metadata)


def read_header(file: Path) -> Mapping[str, str]:
    """Read the metadata of a safetensors file.

    Raises:
        AntherError: the file is pickled or damaged.
    """
    _refuse_pickle(file)
    try:
        with safe_open(file, "pt") as content:
            return content.metadata() or {}
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> AntherError:
    return AntherError(f"{file}: not a safetensors file ({summary(error)}): copy it again")


def _refuse_pickle(file: Path) -> None:
    with file.open("rb") as raw:
        start = raw.read(9)
    is_pickle = start[:2] == b"PK" or (start[:1] == b"\x80" and start[8:] != b"{")  # a safetensors header is JSON
    if is_pickle or file.suffix.lower() in _PICKLES:
        raise AntherError(
            f"{file}: is a pickle, which can run code when it is read: convert it to safetensors where it was made"
        )


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _refuse_pickle(file)
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no mapping
            return tensors, content.metadata() or {}
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _pairs(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the layer, the name of A and the name of B of each A."""
    for name in names:
        for down, up in _PAIRS:
            if name.endswith(down):
                stem = name.removesuffix(down)
                yield stem, name, stem + up
                break


class _Scales:
    """Scales α/r of the layers, from their tensors or from peft's configuration in the header."""

    def __init__(self, file: Path, metadata: Mapping[str, str]) -> None:
        self._file = file
        try:
            self._peft: dict[str, Any] = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        except (ValueError, TypeError) as error:
            raise AntherError(f"{file}: its lora_adapter_metadata can't be read ({summary(error)})") from error

    def of(self, stem: str, rank: int, alpha: Tensor | None) -> float:
        """Return the factor of a layer's product.

        Args:
            stem: name of the layer in the file.
            rank: r.
            alpha: its α in the file; None: it has none.
        """
        if alpha is not None:
            if alpha.numel() != 1:
                raise AntherError(f"{self._file}: {shorten(stem)}.alpha has {alpha.numel()} numbers: must be one")
            return float(alpha) / rank
        part, _, layer = stem.partition(".")
        setting = {
            key.removeprefix(f"{part}."): value for key, value in self._peft.items() if key.startswith(f"{part}.")
        }
        if setting.get("use_dora"):
            raise AntherError(f"{self._file}: is a DoRA: only LoRA, a product of two factors, is read")
        patterns = setting.get("alpha_pattern") or {}
        value = next((a for key, a in patterns.items() if re.fullmatch(rf"(.*\.)?{key}", layer)), None)
        value = setting.get("lora_alpha") if value is None else value
        return 1.0 if value is None else float(value) / (rank**0.5 if setting.get("use_rslora") else rank)


def _module(file: Path, stem: str, down: Tensor, up: Tensor, scale: float) -> LoraModule:
    """Check the factors of one layer, and fold the scale into `up`."""
    shapes = tuple(down.shape), tuple(up.shape)
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or not len(down) or len(down) != up[0].numel():
        raise AntherError(f"{file}: {shorten(stem)}: factors {list(shapes[0])} and {list(shapes[1])} have no product")
    down, up = down.flatten(1), up.flatten(1) * scale
    if not (down.isfinite().all() and up.isfinite().all()):
        raise AntherError(f"{file}: {shorten(stem)}: holds numbers that are not finite: get another copy")
    return LoraModule(down, up, shapes)
