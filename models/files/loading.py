"""Load networks from folders in diffusers' layout: complete, from safetensors only, never from the internet."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import AntherError, shorten, summary

NETWORK, ENCODER = "diffusion_pytorch_model", "model"  # weight file stems of diffusers and of transformers

_INDEX = ".safetensors.index"
_OTHER_PARTS = re.compile(  # further weights that a text encoder's file may contain: the other half of its model
    r"(.*\.)?position_ids|logit_scale|visual_projection\..*|vision_model\..*|text_projection\..*|decoder\..*|"
    r"lm_head\..*|score\..*"
)
_ATTENTION = ("eager", "sdpa")
_LARGEST, _LAYERS = 10**7, 2**9  # limits on a text encoder's configuration: the libraries allocate accordingly


class WeightFiles(NamedTuple):
    """Files of a network's weights."""

    variant: str | None
    """Variant in the file names, e.g. `fp16` in `model.fp16.safetensors`; None: file names without a variant."""
    files: list[Path]


def find_weights(folder: Path, stem: str) -> WeightFiles:
    """Find the weights in a network's folder: without a variant in their name, else fp16, else the only variant.

    Args:
        folder: folder of the network.
        stem: NETWORK or ENCODER.

    Raises:
        AntherError: there are no safetensors, or one of the files is missing.
    """
    variants: dict[str | None, Path] = {}
    for file in sorted(folder.glob(f"{stem}.*")):
        name = re.fullmatch(rf"{stem}(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?", file.name)
        if name and "-of-" not in file.name:
            variant = name[1] or name[2]
            if variant not in variants or _INDEX in file.name:  # an index lists the files to load
                variants[variant] = file
    if not variants:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
        reason = "pickled weights are never read: convert them" if pickled else "copy the whole pipeline"
        raise AntherError(f"{folder}: holds no safetensors ({stem}.safetensors), and {reason}")
    if None not in variants and "fp16" not in variants and len(variants) > 1:
        names = ", ".join(sorted(str(variant) for variant in variants))
        raise AntherError(f"{folder}: holds several variants of its weights ({names}): keep one of them")
    variant = None if None in variants else "fp16" if "fp16" in variants else next(iter(variants))
    file = variants[variant]
    return WeightFiles(variant, _shards(file) if _INDEX in file.name else [file])


def _shards(index: Path) -> list[Path]:
    try:
        names = {*json.loads(index.read_text())["weight_map"].values()}
        files = [index.parent / name for name in sorted(names)]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise AntherError(f"{index}: can't be read ({summary(error)}): copy the pipeline again") from error
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise AntherError(f"{index}: names {file.name}, which isn't in its folder: copy the pipeline again")
    return files


def load_network(kind: Any, folder: Path) -> Any:
    """Load a diffusers network of class `kind` in float32.

    Raises:
        AntherError: the weights are pickled, damaged, or another network's. diffusers would initialize missing weights
            at random.
    """
    network, info = from_pretrained(
        kind, folder, variant=find_weights(folder, NETWORK).variant, output_loading_info=True
    )
    return _check_complete(network, folder, info["missing_keys"])


def load_text_encoder(kind: Any, folder: Path, *, empty: bool = False) -> Any:
    """Load a transformers text encoder of class `kind` in float32.

    Args:
        kind: class in transformers.
        folder: folder of the encoder.
        empty: load it on the meta device, without data.

    Raises:
        AntherError: as `load_network`. transformers also initializes missing weights at random, differently each time,
            and only warns.
    """
    _check_encoder(kind, folder)
    network, info = from_pretrained(
        kind,
        folder,
        variant=find_weights(folder, ENCODER).variant,
        output_loading_info=True,
        **({"device_map": "meta"} if empty else {}),
    )
    foreign = sorted(key for key in info["unexpected_keys"] if not _OTHER_PARTS.fullmatch(key))
    if foreign:
        raise AntherError(
            f"{folder}: holds {len(foreign)} weights that don't belong to a {kind.__name__} ({foreign[0]}, …): "
            "copy it again, with its config.json"
        )
    missing = {*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])}
    return _check_complete(network, folder, missing)


def _check_complete(network: Any, folder: Path, missing: Iterable[str]) -> Any:
    if names := sorted(missing):
        count, first = len(names), names[0]
        raise AntherError(f"{folder}: lacks {count} of the weights that config.json names ({first}, …): copy it again")
    for name, parameter in network.named_parameters():
        if not parameter.is_meta and not is_finite(parameter):
            raise AntherError(f"{folder}: {name} holds numbers that are not finite: get another copy")
    return network.eval()


def is_finite(tensor: Any) -> bool:
    """Return whether all elements are finite, in one pass and without a temporary tensor of the same size."""
    return bool(tensor.detach().sum().isfinite()) or bool(tensor.detach().isfinite().all())


def _check_encoder(kind: Any, folder: Path) -> None:
    """Refuse configurations for which transformers would load code, or weights from elsewhere."""
    if (folder / "adapter_config.json").exists():
        raise AntherError(
            f"{folder}: has an adapter_config.json: merge the adapter into the text encoder, or remove it"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise AntherError(f"{folder / 'config.json'}: can't be read ({summary(error)}): copy it again") from error
    expected, actual = kind.config_class.model_type, config.get("model_type") if isinstance(config, dict) else None
    if actual != expected:  # for another model type the libraries build a model of default size, gigabytes large
        raise AntherError(f"{folder / 'config.json'}: model_type={shorten(actual)}: must be {expected}: copy it again")
    if "quantization_config" in config:
        raise AntherError(f"{folder}: is quantized: use the text encoder in full precision")
    for key, value in _entries(config):
        limit = _LAYERS if "layers" in key else _LARGEST
        if isinstance(value, int | float) and not abs(value) <= limit:
            raise AntherError(f"{folder / 'config.json'}: {key}={shorten(value)}: not plausible for a text encoder")
        if key.endswith("attn_implementation") and value is not None and value not in _ATTENTION:
            raise AntherError(
                f"{folder / 'config.json'}: {key}={shorten(value)}: only {' and '.join(_ATTENTION)} are allowed"
            )


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield keys and values at any depth."""
    if isinstance(config, dict):
        yield from config.items()
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _entries(value)


def from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """Call `kind.from_pretrained`; AntherError with one line if it fails."""
    import torch  # slow import, so only here: locating a base imports this module

    options = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True} | options
    try:
        with quiet_libraries():
            return kind.from_pretrained(folder, **options)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged or foreign file
        raise AntherError(f"{folder}: can't load {kind.__name__} ({summary(error)}): copy it again") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries, which warn about parts that are left out and image processors that aren't needed."""
    import diffusers  # slow import, so only here
    import huggingface_hub
    import transformers

    loggers = [library.utils.logging for library in (diffusers, transformers, huggingface_hub)]
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    for logger in loggers[:2]:
        logger.disable_progress_bar()  # for loading; the hub's is for downloads
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
