"""Benchmark workloads: bases of three sizes with random weights, and examples and jobs of K clients.

The speed doesn't depend on the values of the weights, so nothing is downloaded. Every client has its own 20 examples
with 77 tokens each; a step trains on 4 of them, under DP on a Poisson batch of mean size 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.diffusion.objective import Schedule, diffusion
from models.lora.adapter import Sites, init_adapter
from privacy.noise import SimulatedNoise
from training.jobs import DPSGD, Examples, TrainJob

SITES = r".*\.attn[12]\.to_(q|k|v|out\.0)"
RANK = 8
EXAMPLES = 20  # per client
BATCH = 4  # examples per step; under DP the expected number
TOKENS = 77
LEARNING_RATE = 1e-3
PRIVACY = DPSGD(noise_multiplier=1.0, clip=0.01, sampling_rate=BATCH / EXAMPLES)
POISSON_SIZES = (1, 7, 2, 6, 3, 5, 3, 5, 4, 4)
"""Sizes of ten Poisson batches: the medians of the deciles of Binomial(20, 0.2), whose mean is 4.

Ten random sizes would make a peer's time random; these represent many batches.
"""


@dataclass(frozen=True)
class Workload:
    """Base, described by its diffusers configuration, and the number of clients that share a pass."""

    name: str
    clients: int
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of one example's latents."""
        side = self.config["sample_size"]
        return (4, side, side)

    @property
    def width(self) -> int:
        """Width of the context, d."""
        return int(self.config["cross_attention_dim"])


def _attending(blocks: int) -> dict[str, tuple[str, ...]]:
    """Return a configuration with cross-attention in every block."""
    return {
        "down_block_types": ("CrossAttnDownBlock2D",) * blocks,
        "up_block_types": ("CrossAttnUpBlock2D",) * blocks,
    }


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "tiny",
            3,
            {  # for tests: 8² latents
                "sample_size": 8,
                "block_out_channels": (16, 32),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "cross_attention_dim": 16,
                "attention_head_dim": 2,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            },
        ),
        Workload(
            "small",
            256,
            {  # 4.3 million parameters, 56 sites
                "sample_size": 32,
                "block_out_channels": (64, 128),
                "layers_per_block": 1,
                "cross_attention_dim": 128,
                "attention_head_dim": 4,
                **_attending(2),
            },
        ),
        Workload(
            "medium",
            64,
            {  # 34.3 million parameters, 128 sites
                "sample_size": 64,
                "block_out_channels": (128, 192, 256),
                "layers_per_block": 2,
                "cross_attention_dim": 128,
                "attention_head_dim": 8,
                **_attending(3),
            },
        ),
        Workload(
            "sd15",
            16,
            {  # Stable Diffusion 1.5: 859.5 million parameters, 128 sites
                "sample_size": 64,
                "block_out_channels": (320, 640, 1280, 1280),
                "layers_per_block": 2,
                "cross_attention_dim": 768,
                "attention_head_dim": 8,
                "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            },
        ),
    )
}


def build(workload: Workload, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the workload's frozen UNet with random weights directly on the device.

    Args:
        workload: the base.
        device: device of the weights.
        dtype: data type of the weights.
    """
    from diffusers import UNet2DConditionModel  # here, because the import is slow

    torch.manual_seed(0)
    with device:
        unet: nn.Module = UNet2DConditionModel(**workload.config)
    return unet.to(dtype).requires_grad_(False).eval()


def schedule(device: torch.device) -> Schedule:
    """Return Stable Diffusion's schedule: √β rises linearly from √0.00085 to √0.012 over 1000 steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    return diffusion((1 - betas).cumprod(0).float().to(device), "epsilon")


def examples(workload: Workload, client: int, device: torch.device) -> Examples:
    """Make one client's cached latents and text embeddings.

    Args:
        workload: the base.
        client: seed of the client's examples.
        device: device of the examples.
    """
    generator = torch.Generator().manual_seed(client)
    latents = torch.randn(EXAMPLES, *workload.latent, generator=generator)
    context = torch.randn(EXAMPLES, TOKENS, workload.width, generator=generator)
    return Examples(latents.to(device), context.to(device))


class CountingNoise(SimulatedNoise):
    """Simulated noise of the trainer that also counts the examples of its batches."""

    drawn = 0

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        batch = super().poisson_batch(size, rate)
        self.drawn += len(batch)
        return batch


def jobs(
    data: list[Examples], sites: Sites, *, steps: int, round: int, private: bool
) -> tuple[list[TrainJob], list[CountingNoise]]:
    """Make a new job for each client, and return them with the noise sources of private jobs.

    Args:
        data: examples of each client.
        sites: sites of the adapters.
        steps: steps per job.
        round: round of the jobs.
        private: whether the jobs are private.
    """
    start = init_adapter(sites, RANK, seed=0)
    train_jobs, sources = [], []
    for i, owned in enumerate(data):
        client = f"client-{i}"
        noise = CountingNoise(seed=0, client=client, round=round, purpose="shared") if private else None
        train_jobs.append(
            TrainJob(
                client=client,
                round=round,
                purpose="shared",
                seed=0,
                examples=owned,
                start=start,
                steps=steps,
                batch_size=BATCH,
                learning_rate=LEARNING_RATE,
                privacy=PRIVACY if private else None,
                noise=noise,
                names=tuple(f"{client}-{n}" for n in range(EXAMPLES)),
            )
        )
        sources += [noise] if noise else []
    return train_jobs, sources
