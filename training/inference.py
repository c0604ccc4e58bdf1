"""The base with adapters in slots, without gradients: held-out loss, and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.base import Base
from models.objective import noised, per_example_loss, target
from models.sampling import ddim
from models.slots import Stack, Stacks
from privacy.noise import stream
from training.jobs import Examples
from training.passes import pass_size, run_passes


def select(stacks: Stacks, slots: Sequence[int]) -> Stacks:
    """The stacks of these slots, in this order; a stack that serves everyone stays as it is."""
    return {
        name: stack if stack.a.shape[0] == 1 else Stack(stack.a[list(slots)], stack.b[list(slots)])
        for name, stack in stacks.items()
    }


@torch.no_grad()
def held_out_losses(
    base: Base, pools: Sequence[Examples], adapters: Sequence[Stacks], *, timesteps: int, micro_batch: int
) -> list[float]:
    """Mean denoising loss of each pool of examples, under slot i for pool i.

    Every example is seen at the same `timesteps` evenly spaced timesteps, each with one fixed noise: losses
    of different adapters on one pool differ by the adapters alone.
    """
    if not pools:
        return []
    times = ((torch.arange(timesteps) + 0.5) / timesteps * len(base.schedule)).long()
    longest = max(len(pool) for pool in pools)
    generator = torch.Generator().manual_seed(stream("held-out"))
    noise = torch.randn(longest, timesteps, *pools[0].latents.shape[1:], generator=generator).to(base.device)
    latents = torch.cat([pool.latents.to(base.device) for pool in pools]).repeat_interleave(timesteps, 0)
    context = torch.cat([pool.context.to(base.device) for pool in pools])
    noise = torch.cat([noise[: len(pool)].flatten(0, 1) for pool in pools])
    t = times.repeat(len(latents) // timesteps).to(base.device)
    slot = torch.cat([torch.full((len(pool) * timesteps,), i) for i, pool in enumerate(pools)]).to(base.device)

    @torch.no_grad()  # per thread
    def loss(part: Tensor) -> Tensor:
        x = noised(base.schedule, latents[part], noise[part], t[part])
        output = base.denoise(x, t[part], context[part // timesteps], adapters, slot[part])
        return per_example_loss(output, target(base.schedule, latents[part], noise[part], t[part]))

    parts = torch.arange(len(latents), device=base.device).split(pass_size(base.device, len(latents), micro_batch))
    losses = list(run_passes(base.device, loss, parts))
    per_pool = torch.cat(losses).double().split([len(pool) * timesteps for pool in pools])
    return torch.stack([loss.mean() for loss in per_pool]).tolist()


@torch.no_grad()
def draw(
    base: Base,
    captions: Sequence[str],
    seeds: Sequence[int],
    adapters: Sequence[Stacks],
    slots: Sequence[int],
    *,
    steps: int,
    guidance: float,
    micro_batch: int,
) -> Tensor:
    """Scaled latents [n, c, h, w] for the captions, each from its own seed's noise and under its own slot."""
    context = base.encode_captions([*captions, ""])
    context, null = context[:-1], context[-1]
    x = torch.stack([torch.randn(base.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(
        base.device
    )
    index = torch.tensor(slots, device=base.device)

    def sample(part: Tensor) -> Tensor:
        def denoise(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return base.denoise(x, t, context, adapters, index[part])

        return ddim(
            denoise, base.schedule, x[part], context[part], steps=steps, guidance=guidance, null_context=null
        )  # fmt: skip

    parts = torch.arange(len(x), device=base.device).split(pass_size(base.device, len(x), micro_batch))
    return torch.cat(list(run_passes(base.device, sample, parts)))
