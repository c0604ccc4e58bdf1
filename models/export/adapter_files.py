"""Adapter files with the layouts and metadata of other tools.

    NAME.safetensors          diffusers' layout: `pipe.load_lora_weights`, ComfyUI for transformers
    NAME.kohya.safetensors    kohya's layout: ComfyUI, A1111, Forge, sd-scripts; not for PixArt and Sana

Metadata:

- `ss_…`: of sd-scripts; A1111 distinguishes SD 1, SD 2 and SDXL by `ss_base_model_version` and `ss_v2`
- `modelspec.…`: github.com/Stability-AI/ModelSpec 1.0.1, with sd-scripts' names of architectures
- `anther_…`: of Anther
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from models.export.base_outline import AdaptedBase
from models.export.layouts import LAYOUTS, export
from models.lora.adapter import Adapter
from models.lora.norm_bound import is_zero

log = logging.getLogger(__name__)

CONTENTS = {
    "shared": "the shared adapter of a federation",
    "shared+personal": "the shared adapter and one device's personal adapter combined: load it by itself, not on top "
    "of the shared one, which would then count twice",
    "personal": "one device's personal adapter: load it together with the shared adapter that it was trained on",
}


def write(folder: Path, name: str, adapter: Adapter, base: AdaptedBase, contents: str) -> None:
    """Write an adapter in every layout that its base's family supports.

    Args:
        folder: destination.
        name: file name without suffixes.
        adapter: A and B of every site.
        base: base of the adapter.
        contents: key of `CONTENTS`.
    """
    if is_zero(adapter):
        # A personal one may stay zero: validation pictures can prefer only the shared adapter.
        level = logging.INFO if contents == "personal" else logging.WARNING
        log.log(level, "%s: adapter %s changes nothing, its product is zero at every layer", folder, name)
    for layout in LAYOUTS:
        if layout == "diffusers" or base.family.kohya:
            file = folder / f"{name}{'' if layout == 'diffusers' else f'.{layout}'}.safetensors"
            metadata = describe(base, contents)
            export(adapter, file, family=base.family, sites=base.sites, layout=layout, metadata=metadata)


class _Model(NamedTuple):
    architecture: str
    implementation: str
    sd_scripts: dict[str, str]


def describe(base: AdaptedBase, contents: str) -> dict[str, str]:
    """Return the metadata of an adapter file for this base.

    Args:
        base: base of the adapter.
        contents: key of `CONTENTS`.
    """
    model, base_license = _model(base), base.provenance["licence"]
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{model.architecture}/lora",
        "implementation": model.implementation,
        "title": f"Anther: {contents}",
        "description": CONTENTS[contents],
        "resolution": f"{base.resolution}x{base.resolution}",
    }
    if base.family.network == "unet":
        spec["prediction_type"] = "v" if base.prediction == "v_prediction" else base.prediction
    if base_license != "unknown":
        spec["license"] = base_license
    metadata = {f"modelspec.{key}": value for key, value in spec.items()} | model.sd_scripts
    metadata |= {f"anther_{key}": value for key, value in base.provenance.items()}
    metadata |= {"anther_base": base.hash, "anther_contents": contents}
    if base.family.kohya and (ignored := base.family.kohya.ignored(base.sites)):
        metadata["anther_ignored_by_sd_scripts"] = " ".join(ignored)
    return metadata


def _model(base: AdaptedBase) -> _Model:
    config, name = base.config, base.family.name
    if name == "stable-diffusion":
        # SD 2's projections are linear layers, SD 1's are convolutions: neither loads the other's adapters.
        is_sd2, is_v = bool(config.get("use_linear_projection")), base.prediction == "v_prediction"
        version = f"sd_v{2 if is_sd2 else 1}{'_v' if is_v else ''}"
        architecture = (
            ("stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512") if is_sd2 else ("stable-diffusion-v1")
        )
        return _Model(architecture, "diffusers", {"ss_base_model_version": version, "ss_v2": str(is_sd2)})
    if name == "sdxl":
        sd_scripts = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
        return _Model("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models", sd_scripts)
    if name == "sd3":
        sizes = {(24, True): "-5-medium", (24, False): "-medium", (38, False): "-5-large"}
        size = sizes.get((config["num_layers"], bool(config.get("dual_attention_layers"))), "")
        return _Model(f"stable-diffusion-3{size}", "diffusers", {"ss_base_model_version": "sd3"})
    if name == "flux":
        architecture = "flux-1-dev" if config["guidance_embeds"] else "flux-1-schnell"
        return _Model(architecture, "https://github.com/black-forest-labs/flux", {"ss_base_model_version": "flux1"})
    return _Model(name, "diffusers", {})
