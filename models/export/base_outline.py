"""Outline of a base: its files' identity and its layers, without its weights.

Adapter files only need the names and dimensions of layers, so an adapter of a large base can be exported or imported on
a small device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from common.errors import AntherError, summary
from models.diffusion.sites import adaptable
from models.families.checkpoint import recognize
from models.families.family import Family
from models.files import assets
from models.files.diffusers_classes import diffusers_class
from models.files.loading import quiet_libraries
from models.lora.adapter import Sites


class AdaptedBase(Protocol):
    """Attributes of a base that adapter files describe; `models.base.base.Base` has them too."""

    @property
    def hash(self) -> str:
        """Content hash of its folder."""

    @property
    def family(self) -> Family:
        """Its family."""

    @property
    def provenance(self) -> Mapping[str, str]:
        """Family, license and safety checker."""

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of its network."""

    @property
    def prediction(self) -> str:
        """Predicted quantity: epsilon, v_prediction, sample or flow."""

    @property
    def sites(self) -> Sites:
        """Dimensions of its adapted layers, by name."""


@dataclass(frozen=True, kw_only=True)
class BaseOutline:
    """An `AdaptedBase` without weights; `sites` are all layers that can be adapted, in the network's order."""

    folder: Path
    hash: str
    family: Family
    provenance: Mapping[str, str]
    resolution: int
    config: Mapping[str, Any]
    prediction: str
    sites: Sites


def outline(path: str) -> BaseOutline:
    """Read the outline of the base of this name, hash, or folder; it may be packed.

    Raises:
        AntherError: the base is missing, incomplete or not supported.
    """
    folder = assets.locate(path)
    checkpoint = recognize(folder)
    family, config = checkpoint.family, checkpoint.config(checkpoint.family.network)
    side = family.latents(config).side or 0
    try:
        with torch.device("meta"), quiet_libraries():
            network = diffusers_class(family.kind).from_config(config)
    except Exception as error:  # the libraries raise a dozen kinds for a foreign configuration
        raise AntherError(
            f"base {folder}: can't build a {family.kind} from its configuration ({summary(error)}): copy it again"
        ) from error
    return BaseOutline(
        folder=folder,
        hash=assets.digest(folder),
        family=family,
        provenance=checkpoint.provenance(),
        resolution=side * checkpoint.scale,
        config=config,
        prediction=checkpoint.schedule(1).prediction,
        sites=adaptable(network),
    )
