"""Recognize a pipeline in diffusers' layout from its own files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import AntherError, shorten
from models.diffusion.objective import Schedule
from models.families import encoders
from models.families.checks import check
from models.families.family import FAMILIES, Family
from models.families.lcm import with_guidance_embedding
from models.families.schedules import parse_schedule
from models.files import loading
from models.files.diffusers_classes import diffusers_class
from models.quantization import packed

_VAES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Complete pipeline on disk, of a supported family."""

    folder: Path
    family: Family
    parts: Mapping[str, str]  # class name by part
    requires_safety_checker: bool  # whether its authors require that generated images are checked before they are shown

    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return _json(self.folder, self.folder / part / name)

    @property
    def scale(self) -> int:
        """Pixels per latent along a side."""
        vae = self.config("vae")
        return int(2 ** (len(vae.get("encoder_block_out_channels") or vae["block_out_channels"]) - 1))

    def schedule(self, tokens: int) -> Schedule:
        """Return the forward process for latents of this many tokens; AntherError if the scheduler isn't supported."""
        config = self.config("scheduler")
        try:
            return parse_schedule(config, tokens, logit_normal=self.family.logit_normal)
        except AntherError as error:
            raise AntherError(f"base {self.folder}: its {error}") from error

    def load(self, part: str) -> Any:
        """Load a network of the pipeline in float32; AntherError if it is pickled, damaged, or another network's."""
        return loading.load_network(diffusers_class(self.parts[part]), self.folder / part)

    def load_encoders(self) -> Any:
        """Return the pipeline with only text encoders and tokenizers; AntherError if one is incomplete."""
        with loading.quiet_libraries():  # importing a pipeline class logs warnings
            kind = diffusers_class(self.family.pipeline)
            loaded = encoders.load(self.folder, self.family.encoders, self.parts)
        left_out = dict.fromkeys(self.parts.keys() - loaded.keys())
        return loading.from_pretrained(kind, self.folder, **left_out, **loaded)

    def token_counter(self) -> Callable[[str], int]:
        """Return a function that counts the tokens of a caption that no text encoder reads.

        Raises:
            AntherError: a text encoder or tokenizer is incomplete.
        """
        loaded = encoders.load(self.folder, self.family.encoders, self.parts, empty=True)
        tokenizers = [part for name, part in loaded.items() if name.startswith("tokenizer")]
        return partial(encoders.tokens_cut, tokenizers)

    def verify_encoders(self) -> None:
        """Check that the text encoders load, without reading their weights; AntherError if one is incomplete."""
        encoders.load(self.folder, self.family.encoders, self.parts, empty=True)

    def verify_packed(self) -> None:
        """Check every part of a packed pipeline; only the VAE takes memory."""
        self.verify_encoders()
        self.load("vae")
        packed.load(self.folder / self.family.network, self.parts[self.family.network])
        self.schedule(1)

    def provenance(self) -> dict[str, str]:
        """Return family, license and safety checker, which are copied into exported adapters."""
        return {
            "family": self.family.name,
            "licence": _license(self.folder),  # stored in exported files; don't change
            "safety_checker": self.parts.get("safety_checker", "none"),
            "requires_safety_checker": str(self.requires_safety_checker).lower(),
        }


def recognize(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder.

    Raises:
        AntherError: it isn't a pipeline, isn't supported, or is incomplete.
    """
    if not (folder / "model_index.json").is_file():
        raise AntherError(f"base {folder}: no model_index.json in it: give the folder of a diffusers pipeline")
    index = _json(folder, folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in (known := FAMILIES.names()):
        raise AntherError(f"base {folder}: holds a {shorten(name)}: only {', '.join(known)} are supported")
    family = FAMILIES.lookup(name)
    parts = _parts(folder, index)
    for part in (family.network, "vae", "scheduler", *family.encoders):
        if index.get(part) == [None, None]:
            raise AntherError(f"base {folder}: was saved without its {part}, which encodes captions: copy it too")
        if part not in parts or not (folder / part).is_dir():
            raise AntherError(f"base {folder}: its folder {part} is missing: copy the whole pipeline")
        library = "transformers" if part in family.encoders else "diffusers"
        if index[part][0] != library:
            raise AntherError(
                f"base {folder}: its {part} is from {shorten(index[part][0])}: only parts from {library} are supported"
            )
    for part, kinds in ((family.network, (family.kind,)), ("vae", _VAES)):
        if parts[part] not in kinds:
            raise AntherError(
                f"base {folder}: its {part} is a {shorten(parts[part])}: only {', '.join(kinds)} is supported"
            )
    required = bool(index.get("requires_safety_checker", False))
    checkpoint = Checkpoint(folder=folder, family=family, parts=parts, requires_safety_checker=required)
    network = checkpoint.config(family.network)
    check(folder, family, network, checkpoint.config("vae"), parts["vae"])
    if network.get("time_cond_proj_dim") is not None:
        return replace(checkpoint, family=with_guidance_embedding(family))
    return checkpoint


def _parts(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """Return the class name of each part that the pipeline was saved with."""
    parts = {}
    for part, entry in index.items():
        if not isinstance(entry, list):
            continue  # a setting
        if len(entry) != 2 or not all(value is None or isinstance(value, str) for value in entry):
            raise AntherError(
                f"base {folder}: model_index.json has {shorten(part)}={shorten(entry)}: must be [library, class]"
            )
        if entry[1]:
            parts[part] = entry[1]
    return parts


def _json(folder: Path, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise AntherError(f"base {folder}: {file.relative_to(folder)} is missing: copy it too") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AntherError(
            f"base {folder}: {file.relative_to(folder)} can't be read as JSON ({error}): copy it again"
        ) from error
    if not isinstance(content, dict):
        raise AntherError(f"base {folder}: {file.relative_to(folder)} holds no configuration: copy it again")
    return content


def _license(folder: Path) -> str:
    """Return the license that the model card names, else the name of the license file, else 'unknown'."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    for key in ("license_name", "license"):  # the second is 'other' for a license without a common name
        if match := re.search(rf"^{key}:\s*(\S+)", text, re.MULTILINE):
            return match[1]
    files = sorted(file.name for file in folder.glob("LICENSE*"))
    return files[0] if files else "unknown"
