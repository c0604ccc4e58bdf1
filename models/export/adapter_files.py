"""Files of an adapter in the layouts, and with the metadata keys, that other tools read.

    NAME.safetensors          diffusers' layout: `pipe.load_lora_weights`, ComfyUI for transformers
    NAME.kohya.safetensors    kohya's layout: ComfyUI, A1111, Forge, sd-scripts; not of PixArt and Sana

Metadata:

- `ss_…`: sd-scripts' own; A1111 tells SD 1, SD 2 and SDXL apart by `ss_base_model_version` and `ss_v2`
- `modelspec.…`: github.com/Stability-AI/ModelSpec 1.0.1, architectures by the names that sd-scripts gives them
- `anther_…`: ours
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

from models.base.base import Base
from models.export.layouts import LAYOUTS, export
from models.lora.adapter import Adapter

CONTENTS = {
    "shared": "the shared adapter of a federation",
    "shared+personal": "the shared adapter and one device's personal adapter in one: load it alone, not on top of the "
    "shared one, which would then count twice",
    "personal": "one device's personal adapter alone: load it together with the shared adapter that it sits on",
}


def write(folder: Path, name: str, adapter: Adapter, base: Base, contents: str) -> None:
    """Write an adapter of a base in every supported layout.

    Args:
        name: file name without suffixes.
        contents: one of `CONTENTS`.
    """
    for layout in LAYOUTS:
        if layout == "diffusers" or base.family.kohya:
            file = folder / f"{name}{'' if layout == 'diffusers' else f'.{layout}'}.safetensors"
            told = describe(base, contents)
            export(adapter, file, family=base.family, sites=base.sites, layout=layout, metadata=told)


class _Kind(NamedTuple):
    architecture: str
    implementation: str
    ss: dict[str, str]


def describe(base: Base, contents: str) -> dict[str, str]:
    """Return the metadata of an adapter file for this base.

    Args:
        contents: one of `CONTENTS`.
    """
    kind, licence = _kind(base), base.provenance["licence"]
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{kind.architecture}/lora",
        "implementation": kind.implementation,
        "title": f"Anther: {contents}",
        "description": CONTENTS[contents],
        "resolution": f"{base.resolution}x{base.resolution}",
    }
    if base.family.network == "unet":
        spec["prediction_type"] = "v" if base.schedule.prediction == "v_prediction" else base.schedule.prediction
    if licence != "unknown":
        spec["license"] = licence
    told = {f"modelspec.{key}": value for key, value in spec.items()} | kind.ss
    told |= {f"anther_{key}": value for key, value in base.provenance.items()}
    told |= {"anther_base": base.hash, "anther_contents": contents}
    if base.family.kohya and (ignored := base.family.kohya.ignored(base.sites)):
        told["anther_ignored_by_sd_scripts"] = " ".join(ignored)
    return told


def _kind(base: Base) -> _Kind:
    config: Any = cast(Any, base.network).config
    name = base.family.name
    if name == "stable-diffusion":
        # SD 2's projections are linear layers, SD 1's are convolutions: neither loads the other's adapters.
        second, v = bool(config.get("use_linear_projection")), base.schedule.prediction == "v_prediction"
        version = f"sd_v{2 if second else 1}{'_v' if v else ''}"
        architecture = (
            ("stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512") if second else ("stable-diffusion-v1")
        )
        return _Kind(architecture, "diffusers", {"ss_base_model_version": version, "ss_v2": str(second)})
    if name == "sdxl":
        told = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
        return _Kind("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models", told)
    if name == "sd3":
        size = {(24, True): "-5-medium", (24, False): "-medium", (38, False): "-5-large"}
        found = size.get((config["num_layers"], bool(config.get("dual_attention_layers"))), "")
        return _Kind(f"stable-diffusion-3{found}", "diffusers", {"ss_base_model_version": "sd3"})
    if name == "flux":
        architecture = "flux-1-dev" if config["guidance_embeds"] else "flux-1-schnell"
        return _Kind(architecture, "https://github.com/black-forest-labs/flux", {"ss_base_model_version": "flux1"})
    return _Kind(name, "diffusers", {})
