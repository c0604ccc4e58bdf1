"""The base with adapters in slots, without gradients: held-out loss, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.base.base import Base
from models.base.denoiser import Denoiser
from models.diffusion.objective import add_noise, per_example_loss, target
from models.diffusion.sampling import num_noises, sample
from models.lora.adapter import Adapter
from models.lora.batched_lora import BatchedAdapter, select_slots, stack_adapters, to_device
from training.capacity import max_pictures_per_pass
from training.jobs import Cancelled, Examples, never
from training.parallel_passes import pass_size, run_passes, without_denormals


def held_out_losses(
    base: Denoiser,
    pools: Sequence[Examples],
    adapters: Sequence[BatchedAdapter],
    *,
    timesteps: int,
    memory: int,
    cancelled: Callable[[], bool] = never,
) -> list[float]:
    """Mean denoising loss of each pool of examples, under slot i for pool i.

    Every example is seen at the same `timesteps` evenly spaced timesteps, each with one fixed noise: losses
    of different adapters on one pool differ by the adapters alone. `memory`: bytes for all passes that run at once.
    `cancelled`: asked before every pass; Cancelled is raised when it says so.
    """
    if not pools:
        return []
    place = torch.cat([torch.arange(len(pool)) for pool in pools])
    count = len(place) * timesteps
    size = pass_size(base.device, count, _most(base, pools, adapters, memory))
    losses = _losses(base, pools, adapters, timesteps, place, torch.arange(count).split(size), cancelled)
    return [loss.mean().item() for loss in losses]


def each_loss(
    base: Denoiser,
    pools: Sequence[Examples],
    adapters: Sequence[BatchedAdapter],
    *,
    timesteps: int,
    memory: int,
    cancelled: Callable[[], bool] = never,
) -> list[Tensor]:
    """Denoising loss of each example of each pool, float64 [n], under slot i for pool i.

    As `held_out_losses`, but all examples are seen with the same noise, and no pass holds looks at two of them: what is
    measured of an example is a function of it alone, however a layer's sums depend on the size of its batch.
    """
    if not sum(map(len, pools)):
        return [torch.zeros(0, dtype=torch.float64) for _ in pools]
    place = torch.zeros(sum(map(len, pools)), dtype=torch.long)
    size = min(timesteps, _most(base, pools, adapters, memory))
    looks = torch.arange(len(place) * timesteps).split(timesteps)
    parts = [part for look in looks for part in look.split(size)]
    return [loss.mean(1) for loss in _losses(base, pools, adapters, timesteps, place, parts, cancelled)]


def _most(base: Denoiser, pools: Sequence[Examples], adapters: Sequence[BatchedAdapter], memory: int) -> int:
    """Entries that one pass may hold."""
    return max_pictures_per_pass(base, pools[0].latents.shape[1:], pools[0].context.shape[1:], adapters, memory)


@torch.no_grad()
def _losses(
    base: Denoiser,
    pools: Sequence[Examples],
    adapters: Sequence[BatchedAdapter],
    timesteps: int,
    place: Tensor,
    parts: Sequence[Tensor],
    cancelled: Callable[[], bool],
) -> list[Tensor]:
    """Losses [n, timesteps] of each pool, float64.

    Args:
        place: of each example of all pools [N], which of the fixed noises it is seen with.
        parts: the entries of each pass, N · timesteps in all: an example's looks lie side by side.
    """
    times = ((torch.arange(timesteps) + 0.5) / timesteps * len(base.schedule)).long().to(base.device)
    generator = torch.Generator().manual_seed(derive_seed("held-out"))
    full_precision = torch.zeros((), dtype=base.full_precision, device=base.device)
    noise = torch.randn(int(place.max()) + 1, timesteps, *pools[0].latents.shape[1:], generator=generator).to(
        full_precision
    )
    latents = torch.cat([pool.latents for pool in pools]).to(full_precision)
    context = torch.cat([pool.context for pool in pools]).to(base.like)
    sizes = torch.tensor([len(pool) for pool in pools], device=base.device)
    slot = torch.arange(len(pools), device=base.device).repeat_interleave(sizes)
    place = place.to(base.device)

    @torch.no_grad()  # per thread
    def loss(part: Tensor) -> Tensor:
        _ask(cancelled)
        example, look = part // timesteps, part % timesteps
        x0, t, epsilon = latents[example], times[look], noise[place[example], look]
        lent = [select_slots(stacks, slot[example]) for stacks in adapters]
        with without_denormals(base.device), base.use_adapters(lent) as denoise:
            output = denoise(add_noise(base.schedule, x0, epsilon, t), base.schedule.times[t], context[example])
        return per_example_loss(output, target(base.schedule, x0, epsilon, t))

    losses = torch.cat(list(run_passes(base.device, loss, [part.to(base.device) for part in parts])))
    counts = [len(pool) for pool in pools]
    return list(losses.double().cpu().view(-1, timesteps).split(counts))


@torch.no_grad()
def draw(
    base: Base,
    captions: Sequence[str],
    seeds: Sequence[int],
    adapters: Sequence[BatchedAdapter],
    slots: Sequence[int],
    *,
    sampler: str,
    steps: int,
    guidance: float,
    memory: int,
    cancelled: Callable[[], bool] = never,
) -> Tensor:
    """Scaled latents [n, c, h, w] for the captions, each from its own seed's noise and under its own slot."""
    context, null, strength = base.encode_guidance(captions, guidance)
    count = num_noises(sampler, steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noises = torch.stack([torch.randn(count, *base.shape, generator=generator) for generator in generators], dim=1)
    noises, index = noises.to(base.device), torch.tensor(slots, device=base.device)

    def one_pass(part: Tensor) -> Tensor:
        _ask(cancelled)
        with base.use_adapters([select_slots(stacks, index[part]) for stacks in adapters]) as denoise:
            return sample(
                sampler,
                denoise,
                base.schedule,
                list(noises[:, part]),
                context[part],
                steps=steps,
                guidance=strength,
                null_context=null,
            )

    most = max_pictures_per_pass(base, noises.shape[2:], context.shape[1:], adapters, memory)
    parts = torch.arange(len(seeds), device=base.device).split(pass_size(base.device, len(seeds), most))
    return torch.cat(list(run_passes(base.device, one_pass, parts)))


def generate_with(
    base: Base,
    captions: Sequence[str],
    adapters: Sequence[Adapter],
    *,
    seed: int,
    sampler: str,
    steps: int,
    guidance: float,
    memory: int,
    cancelled: Callable[[], bool] = never,
) -> Tensor:
    """Scaled latents [n, c, h, w] for the captions, all under the same adapters on top of each other."""
    seeds = [derive_seed(seed, caption, "draw") for caption in captions]
    stacks = [to_device(stack_adapters(base.sites, [adapter]), base.like) for adapter in adapters]
    return draw(
        base,
        captions,
        seeds,
        stacks,
        [0] * len(captions),
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        memory=memory,
        cancelled=cancelled,
    )


def _ask(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("stopped between two passes")
