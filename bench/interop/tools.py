"""Loaders of other tools, imported from their checkouts.

Modules that they import but don't need here (devices, models, user interfaces) are replaced by empty ones.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.interop.networks import SmallNetwork
from models.families.kohya import KOHYA_PREFIX


class Loaded(NamedTuple):
    """Outcome of loading one file."""

    changes: Mapping[str, Tensor]  # of the original weights, or for sd-scripts by the name of the module
    unread: tuple[str, ...]  # tensors that the tool doesn't read


class _Empty(ModuleType):
    """A module whose missing attributes are classes of their own."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        created = type(name, (), {})
        setattr(self, name, created)
        return created


class _Unset:
    """Arguments of a command line that are all unset."""

    def __getattr__(self, name: str) -> Any:
        return None


def _replace(name: str, **attributes: Any) -> ModuleType:
    module = _Empty(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(importlib.import_module(parent), child, module)
    return module


def _cast(tensor: Tensor, device: torch.device, dtype: torch.dtype, copy: bool = False) -> Tensor:
    return tensor.to(device, dtype, copy=copy)


class ComfyUI:
    """ComfyUI's loader, from `comfy/lora.py`."""

    name, layouts = "ComfyUI", ("kohya", "diffusers")

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        _replace("einops")
        _replace("comfy.cli_args", args=_Unset())
        _replace("comfy.checkpoint_pickle")
        _replace("comfy.model_management", cast_to_device=_cast)
        self._bases = _replace("comfy.model_base")
        self.lora: Any = importlib.import_module("comfy.lora")
        self.convert: Any = importlib.import_module("comfy.lora_convert").convert_lora
        self.utils: Any = importlib.import_module("comfy.utils")

    def load(self, file: Path, network: SmallNetwork, weights: Mapping[str, Tensor]) -> Loaded:
        """Load a file for a network.

        Args:
            file: exported adapter.
            network: the network.
            weights: original weights; only their names and shapes are used.
        """
        kind = {"sd3": "SD3", "flux": "Flux"}.get(network.family.name, "SDXL")
        model = getattr(self._bases, kind)()
        state = {f"diffusion_model.{key}": torch.zeros(weight.shape) for key, weight in weights.items()}
        model.state_dict = lambda: state
        model.model_config = SimpleNamespace(unet_config=network.original_config)
        tensors = self.convert(load_file(file))
        missing = _Warnings()
        logging.getLogger().addHandler(missing)
        try:
            patches = self.lora.load_lora(tensors, self.lora.model_lora_keys_unet(model, {}))
        finally:
            logging.getLogger().removeHandler(missing)
        for target, patch in patches.items():
            key, offset, convert = (*target, None)[:3] if isinstance(target, tuple) else (target, None, None)
            entry = (1.0, patch, 1.0, offset, convert)
            state[key] = self.lora.calculate_weight([entry], state[key], key)
        return Loaded({key.removeprefix("diffusion_model."): w for key, w in state.items()}, tuple(missing.names))


class _Warnings(logging.Handler):
    """Collects the tensors that ComfyUI warns about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.names.append(record.getMessage().removeprefix("lora key not loaded: "))


class Forge:
    """Forge's loader, from `backend/patcher/lora.py`."""

    name, layouts = "Forge", ("kohya",)

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        for name in ("memory_management", "utils", "operations"):
            _replace(f"backend.{name}", cast_to_device=_cast)
        self.lora: Any = importlib.import_module("backend.patcher.lora")
        self.utils: Any = importlib.import_module("packages_3rdparty.comfyui_lora_collection.utils")

    def load(self, file: Path, network: SmallNetwork, weights: Mapping[str, Tensor]) -> Loaded:
        """See `ComfyUI.load`."""
        state = {f"diffusion_model.{key}": torch.zeros(weight.shape) for key, weight in weights.items()}
        inner = SimpleNamespace(config=network.original_config)
        repository = SimpleNamespace(huggingface_repo=network.name)  # of a known base; Forge looks for "flux" in it
        model = SimpleNamespace(state_dict=lambda: state, diffusion_model=inner, config=repository)
        patches, unread = self.lora.load_lora(load_file(file), self.lora.model_lora_keys_unet(model, {}))
        for target, patch in patches.items():
            key, offset, convert = (*target, None)[:3] if isinstance(target, tuple) else (target, None, None)
            entry = (1.0, patch, 1.0, offset, convert)
            state[key] = self.lora.merge_lora_to_weight([entry], state[key], key)
        return Loaded({key.removeprefix("diffusion_model."): w for key, w in state.items()}, tuple(unread))


class SDScripts:
    """sd-scripts' loaders, from `networks/`, on its own networks; for SD 1 and 2 on diffusers' UNet, as it does."""

    name, layouts = "sd-scripts", ("kohya",)

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        _replace("einops")
        _replace("library.utils", setup_logging=lambda *_, **__: None)
        _replace("library.device_utils", init_ipex=lambda: None)

    def load(self, file: Path, network: SmallNetwork, weights: Mapping[str, Tensor]) -> Loaded:  # noqa: ARG002
        """Load a file; changes are by the module's name in the file."""
        make: Callable[[SmallNetwork], tuple[str, Any]] = {"sd3": _mmdit, "flux": _flux, "sdxl": _sdxl}.get(
            network.family.name, _unet
        )
        module, model = make(network)
        create = importlib.import_module(module).create_network_from_weights
        lora, tensors = create(1.0, None, None, [], model, load_file(file), for_inference=True)
        for each in lora.unet_loras:
            lora.add_module(each.lora_name, each)
        unread = lora.load_state_dict(tensors, strict=False).unexpected_keys
        return Loaded({each.lora_name: each.get_weight() for each in lora.unet_loras}, tuple(unread))


def _unet(network: SmallNetwork) -> tuple[str, Any]:
    import diffusers

    with torch.device("meta"):
        return "networks.lora", diffusers.UNet2DConditionModel.from_config(network.config)


def _sdxl(_: SmallNetwork) -> tuple[str, Any]:
    with torch.device("meta"):
        return "networks.lora", importlib.import_module("library.sdxl_original_unet").SdxlUNet2DConditionModel()


def _flux(network: SmallNetwork) -> tuple[str, Any]:
    models: Any = importlib.import_module("library.flux_models")
    config = network.config
    params = models.FluxParams(
        in_channels=config["in_channels"],
        vec_in_dim=config["pooled_projection_dim"],
        context_in_dim=config["joint_attention_dim"],
        hidden_size=config["attention_head_dim"] * config["num_attention_heads"],
        mlp_ratio=4.0,
        num_heads=config["num_attention_heads"],
        depth=config["num_layers"],
        depth_single_blocks=config["num_single_layers"],
        axes_dim=list(config["axes_dims_rope"]),
        theta=10_000,
        qkv_bias=True,
        guidance_embed=config["guidance_embeds"],
    )
    with torch.device("meta"):
        return "networks.lora_flux", models.Flux(params)


def _mmdit(network: SmallNetwork) -> tuple[str, Any]:
    models: Any = importlib.import_module("library.sd3_models")
    config = network.config
    with torch.device("meta"):
        return "networks.lora_sd3", models.MMDiT(
            input_size=None,
            pos_embed_max_size=config["pos_embed_max_size"],
            patch_size=config["patch_size"],
            in_channels=config["in_channels"],
            adm_in_channels=config["pooled_projection_dim"],
            context_embedder_in_features=config["joint_attention_dim"],
            context_embedder_out_features=config["caption_projection_dim"],
            depth=config["num_layers"],
            qk_norm="rms",
            x_block_self_attn_layers=list(config["dual_attention_layers"]),
            num_patches=config["pos_embed_max_size"] ** 2,
        )


def module_name(key: str) -> str:
    """Return kohya's name of an original weight."""
    return KOHYA_PREFIX + key.removesuffix(".weight").replace(".", "_")
