"""A tiny pipeline of each family, and its base."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import pytest
from torch import Tensor

from bench.lib.tiny_pipelines import PIPELINES, save
from models.base.base import Base


@dataclass(frozen=True)
class TinyPipeline:
    """Pipeline on disk, and the base loaded from it."""

    name: str
    folder: Path

    @cached_property
    def base(self) -> Base:
        return Base(self.folder, resolution={"sdxl": 64, "sana": 32}.get(self.name, 16))

    def pipeline(self) -> Any:
        """Load the complete pipeline in diffusers."""
        result: Any = diffusers.DiffusionPipeline.from_pretrained(self.folder)
        result.set_progress_bar_config(disable=True)
        return result

    def sample(self, pipeline: Any, captions: list[str], noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Sample latents in diffusers from this noise, with the same steps as `models.diffusion.sampling`."""
        options: dict[str, Any] = {"height": self.base.resolution, "width": self.base.resolution}
        if self.base.schedule.prediction == "flow":
            options["sigmas"] = [1 - i / steps for i in range(steps)]
        else:
            pipeline.scheduler = diffusers.DDIMScheduler.from_config(
                pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
            )
        if self.name in ("pixart", "sana"):
            options |= {"clean_caption": False, "use_resolution_binning": False}
        if self.name == "sana":
            pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        packed = self.name.startswith("flux")
        if packed:
            noise = pipeline._pack_latents(noise, *noise.shape)
        result: Tensor = pipeline(
            captions, latents=noise, num_inference_steps=steps, guidance_scale=guidance, output_type="latent", **options
        ).images
        if not packed:
            return result
        return pipeline._unpack_latents(result, self.base.resolution, self.base.resolution, pipeline.vae_scale_factor)


@pytest.fixture(scope="session", params=PIPELINES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyPipeline:
    return TinyPipeline(request.param, save(request.param, tmp_path_factory.mktemp(request.param)))
