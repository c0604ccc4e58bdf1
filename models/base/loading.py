"""Networks from folders in diffusers' layout: from safetensors only, whole, never from the internet."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import AntherError, shown, summary

NETWORK, ENCODER = "diffusion_pytorch_model", "model"  # how diffusers and transformers call their weights

_INDEX = ".safetensors.index"
_ELSEWHERE = re.compile(  # what a text encoder's file may hold beside it: the rest of the model that it is half of
    r"(.*\.)?position_ids|logit_scale|visual_projection\..*|vision_model\..*|text_projection\..*|decoder\..*|"
    r"lm_head\..*|score\..*"
)
_ATTENTION = ("eager", "sdpa")
_LARGEST, _LAYERS = 10**7, 2**9  # of a number in a text encoder's configuration: the libraries make what it says


class WeightFiles(NamedTuple):
    """The files of a network's weights."""

    variant: str | None
    """As in `model.fp16.safetensors`; None: those without one in their name."""
    files: list[Path]


def find_weights(folder: Path, stem: str) -> WeightFiles:
    """The weights in a network's folder: those without a variant in their name, else of fp16, else of the only variant.

    Args:
        stem: NETWORK or ENCODER.

    Raises:
        AntherError: there are none in safetensors, or one of their files is missing.
    """
    found: dict[str | None, Path] = {}
    for file in sorted(folder.glob(f"{stem}.*")):
        name = re.fullmatch(rf"{stem}(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?", file.name)
        if name and "-of-" not in file.name:
            variant = name[1] or name[2]
            if variant not in found or _INDEX in file.name:  # an index says which files count
                found[variant] = file
    if not found:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
        reason = "pickled weights are never read: convert them" if pickled else "copy the whole pipeline"
        raise AntherError(f"{folder}: holds no safetensors ({stem}.safetensors), and {reason}")
    if None not in found and "fp16" not in found and len(found) > 1:
        names = ", ".join(sorted(str(variant) for variant in found))
        raise AntherError(f"{folder}: holds several variants of its weights ({names}): leave one of them there")
    variant = None if None in found else "fp16" if "fp16" in found else next(iter(found))
    file = found[variant]
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
    """A network of diffusers of this class in float32.

    Raises:
        AntherError: it is pickled, damaged or foreign. diffusers draws weights at random that a file lacks.
    """
    network, found = from_pretrained(
        kind, folder, variant=find_weights(folder, NETWORK).variant, output_loading_info=True
    )
    return _whole(network, folder, found["missing_keys"])


def load_text_encoder(kind: Any, folder: Path, *, empty: bool = False) -> Any:
    """A text encoder of transformers of this class, in float32.

    Args:
        empty: on the meta device, without its numbers.

    Raises:
        AntherError: as from_folder. transformers draws weights at random too, anew each time, and warns of it.
    """
    _check_encoder(kind, folder)
    network, found = from_pretrained(
        kind,
        folder,
        variant=find_weights(folder, ENCODER).variant,
        output_loading_info=True,
        **({"device_map": "meta"} if empty else {}),
    )
    foreign = sorted(key for key in found["unexpected_keys"] if not _ELSEWHERE.fullmatch(key))
    if foreign:
        raise AntherError(
            f"{folder}: holds {len(foreign)} weights that are none of a {kind.__name__}'s ({foreign[0]}, …): "
            "copy it again, with its config.json"
        )
    return _whole(network, folder, {*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])})


def _whole(network: Any, folder: Path, missing: Iterable[str]) -> Any:
    if lacking := sorted(missing):
        count, one = len(lacking), lacking[0]
        raise AntherError(f"{folder}: lacks {count} of the weights that config.json names ({one}, …): copy it again")
    for name, parameter in network.named_parameters():
        if not parameter.is_meta and not is_finite(parameter):
            raise AntherError(f"{folder}: {name} holds numbers that are not finite: get another copy")
    return network.eval()


def is_finite(tensor: Any) -> bool:
    """Whether all of a tensor's numbers are finite, found in one pass without another tensor of its size."""
    return bool(tensor.detach().sum().isfinite()) or bool(tensor.detach().isfinite().all())


def _check_encoder(kind: Any, folder: Path) -> None:
    """What transformers would do besides loading weights: take code or other weights from elsewhere."""
    if (folder / "adapter_config.json").exists():
        raise AntherError(
            f"{folder}: has an adapter_config.json: merge the adapter into the text encoder, or remove it"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise AntherError(f"{folder / 'config.json'}: can't be read ({summary(error)}): copy it again") from error
    wanted, given = kind.config_class.model_type, config.get("model_type") if isinstance(config, dict) else None
    if given != wanted:  # of another model's configuration the libraries make one of their default size, of gigabytes
        raise AntherError(f"{folder / 'config.json'}: model_type={shown(given)}: must be {wanted}: copy it again")
    if "quantization_config" in config:
        raise AntherError(f"{folder}: is quantized: give the text encoder in full precision")
    for key, value in _entries(config):
        most = _LAYERS if "layers" in key else _LARGEST
        if isinstance(value, int | float) and not abs(value) <= most:
            raise AntherError(f"{folder / 'config.json'}: {key}={shown(value)}: no text encoder is like that")
        if key.endswith("attn_implementation") and value is not None and value not in _ATTENTION:
            raise AntherError(
                f"{folder / 'config.json'}: {key}={shown(value)}: only {' and '.join(_ATTENTION)} are allowed"
            )


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values at any depth."""
    if isinstance(config, dict):
        yield from config.items()
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _entries(value)


def from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """What diffusers or transformers makes of a folder; AntherError if nothing."""
    import torch  # slow import, so only here: whoever asks where a base lies comes by

    options = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True} | options
    try:
        with quiet_libraries():
            return kind.from_pretrained(folder, **options)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged or foreign file
        raise AntherError(f"{folder}: can't load {kind.__name__} ({summary(error)}): copy it again") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without a word from the libraries, who miss what we leave out and image processors that nobody needs."""
    import diffusers  # slow import, so only here
    import huggingface_hub
    import transformers

    loggers = [library.utils.logging for library in (diffusers, transformers, huggingface_hub)]
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    for logger in loggers[:2]:
        logger.disable_progress_bar()  # of loading; the hub's is of fetching
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
