"""Inference of the base with batched adapters: held-out losses and image generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.base.base import Base
from models.diffusion.denoiser import Denoise, Denoiser
from models.diffusion.objective import add_noise, per_example_loss, target
from models.diffusion.sampling import num_noises, sample
from models.lora.adapter import Adapter
from models.lora.batched_lora import BatchedAdapter, select_slots, stack_adapters, to_device
from training.capacity import max_pictures_per_pass
from training.jobs import Cancelled, Examples, never
from training.passes import pass_size, run_passes, without_denormals

_SEED_LABEL = "draw"  # part of the seeds: changing it changes every image


def held_out_losses(
    base: Denoiser,
    pools: Sequence[Examples],
    adapters: Sequence[BatchedAdapter],
    *,
    timesteps: int,
    memory: int,
    cancelled: Callable[[], bool] = never,
) -> list[float]:
    """Compute the mean denoising loss of each pool of examples, under slot i for pool i.

    Every example is evaluated at the same evenly spaced timesteps, each with one fixed noise, so that losses of
    different adapters on one pool differ only because of the adapters.

    Args:
        base: the base.
        pools: pools of examples.
        adapters: batched adapters that are applied together, with a slot for each pool.
        timesteps: number of timesteps.
        memory: bytes for all concurrent passes.
        cancelled: called before every pass.

    Returns:
        One loss for each pool.

    Raises:
        Cancelled: `cancelled` returned True.
    """
    if not pools:
        return []
    noise_index = torch.cat([torch.arange(len(pool)) for pool in pools])
    count = len(noise_index) * timesteps
    size = pass_size(base.device, count, _max_pass_size(base, pools, adapters, memory))
    losses = _losses(base, pools, adapters, timesteps, noise_index, torch.arange(count).split(size), cancelled)
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
    """Compute the denoising loss of each example of each pool, under slot i for pool i.

    As in `held_out_losses`, but all examples are evaluated with the same noise, and no pass holds entries of two
    examples: an example's loss is a function of it only, even if a layer's sums depend on the size of its batch.

    Args:
        base: the base.
        pools: pools of examples.
        adapters: batched adapters that are applied together, with a slot for each pool.
        timesteps: number of timesteps.
        memory: bytes for all concurrent passes.
        cancelled: called before every pass.

    Returns:
        Losses float64 [n] of each pool.

    Raises:
        Cancelled: `cancelled` returned True.
    """
    if not sum(map(len, pools)):
        return [torch.zeros(0, dtype=torch.float64) for _ in pools]
    noise_index = torch.zeros(sum(map(len, pools)), dtype=torch.long)
    size = min(timesteps, _max_pass_size(base, pools, adapters, memory))
    entries = torch.arange(len(noise_index) * timesteps).split(timesteps)
    parts = [part for of_example in entries for part in of_example.split(size)]
    return [loss.mean(1) for loss in _losses(base, pools, adapters, timesteps, noise_index, parts, cancelled)]


def _max_pass_size(base: Denoiser, pools: Sequence[Examples], adapters: Sequence[BatchedAdapter], memory: int) -> int:
    """Compute the maximum number of entries of one pass."""
    return max_pictures_per_pass(base, pools[0].latents.shape[1:], pools[0].context.shape[1:], adapters, memory)


@torch.no_grad()
def _losses(
    base: Denoiser,
    pools: Sequence[Examples],
    adapters: Sequence[BatchedAdapter],
    timesteps: int,
    noise_index: Tensor,
    parts: Sequence[Tensor],
    cancelled: Callable[[], bool],
) -> list[Tensor]:
    """Compute the losses [n, timesteps] of each pool, float64.

    Args:
        base: the base.
        pools: pools of examples, N examples in total.
        adapters: batched adapters with a slot for each pool.
        timesteps: number of timesteps.
        noise_index: index of the fixed noise of each example [N].
        parts: entries of each pass, N · timesteps in total; an example's timesteps are consecutive.
        cancelled: called before every pass.
    """
    times = ((torch.arange(timesteps) + 0.5) / timesteps * len(base.schedule)).long().to(base.device)
    generator = torch.Generator().manual_seed(derive_seed("held-out"))
    full_precision = torch.zeros((), dtype=base.full_precision, device=base.device)
    noise = torch.randn(int(noise_index.max()) + 1, timesteps, *pools[0].latents.shape[1:], generator=generator).to(
        full_precision
    )
    latents = torch.cat([pool.latents for pool in pools]).to(full_precision)
    context = torch.cat([pool.context for pool in pools]).to(base.like)
    sizes = torch.tensor([len(pool) for pool in pools], device=base.device)
    slot = torch.arange(len(pools), device=base.device).repeat_interleave(sizes)
    noise_index = noise_index.to(base.device)

    @torch.no_grad()  # per thread
    def loss(part: Tensor) -> Tensor:
        _check_cancelled(cancelled)
        example, timestep_index = part // timesteps, part % timesteps
        x0, t, epsilon = latents[example], times[timestep_index], noise[noise_index[example], timestep_index]
        selected = [select_slots(stacks, slot[example]) for stacks in adapters]
        with without_denormals(base.device), base.use_adapters(selected) as denoise:
            output = denoise(add_noise(base.schedule, x0, epsilon, t), base.schedule.times[t], context[example])
        return per_example_loss(output, target(base.schedule, x0, epsilon, t))

    losses = torch.cat(list(run_passes(base.device, loss, [part.to(base.device) for part in parts])))
    counts = [len(pool) for pool in pools]
    return list(losses.double().cpu().view(-1, timesteps).split(counts))


@torch.no_grad()
def generate(
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
    guides: Sequence[BatchedAdapter] | None = None,
    cancelled: Callable[[], bool] = never,
) -> Tensor:
    """Generate scaled latents for captions, each from its own seed and under its own slot.

    Args:
        base: the base.
        captions: captions [n].
        seeds: seeds of the noises [n].
        adapters: batched adapters that are applied together.
        slots: slot of each caption [n].
        sampler: name of the sampler.
        steps: number of sampling steps.
        guidance: strength of classifier-free guidance.
        memory: bytes for all concurrent passes.
        guides: adapters of the unconditional prediction, with the same slots; None: `adapters`.
        cancelled: called before every pass.

    Returns:
        Latents [n, c, h, w].
    """
    context, null, strength = base.encode_guidance(captions, guidance)
    count = num_noises(sampler, steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noises = torch.stack([torch.randn(count, *base.shape, generator=generator) for generator in generators], dim=1)
    noises, index = noises.to(base.device), torch.tensor(slots, device=base.device)

    def generate_pass(part: Tensor) -> Tensor:
        _check_cancelled(cancelled)
        with ExitStack() as contexts:

            def network(group: Sequence[BatchedAdapter]) -> Denoise:
                selected = [select_slots(stacks, index[part]) for stacks in group]
                return contexts.enter_context(base.use_adapters(selected))

            return sample(
                sampler,
                network(adapters),
                base.schedule,
                list(noises[:, part]),
                context[part],
                steps=steps,
                guidance=strength,
                null_context=null,
                guide=None if null is None or guides is None else network(guides),
            )

    held = [*adapters, *(guides or ())]
    limit = max_pictures_per_pass(base, noises.shape[2:], context.shape[1:], held, memory)
    parts = torch.arange(len(seeds), device=base.device).split(pass_size(base.device, len(seeds), limit))
    return torch.cat(list(run_passes(base.device, generate_pass, parts)))


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
    guides: Sequence[Adapter] | None = None,
    cancelled: Callable[[], bool] = never,
) -> Tensor:
    """Generate scaled latents for captions, all under the sum of the same adapters.

    Args:
        base: the base.
        captions: captions [n].
        adapters: adapters that are applied together.
        seed: seed, combined with each caption.
        sampler: name of the sampler.
        steps: number of sampling steps.
        guidance: strength of classifier-free guidance.
        memory: bytes for all concurrent passes.
        guides: adapters of the unconditional prediction; None: `adapters`.
        cancelled: called before every pass.

    Returns:
        Latents [n, c, h, w].
    """
    seeds = [derive_seed(seed, caption, _SEED_LABEL) for caption in captions]

    def stacked(group: Sequence[Adapter]) -> list[BatchedAdapter]:
        return [to_device(stack_adapters(base.sites, [adapter]), base.like) for adapter in group]

    return generate(
        base,
        captions,
        seeds,
        stacked(adapters),
        [0] * len(captions),
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        memory=memory,
        guides=None if guides is None else stacked(guides),
        cancelled=cancelled,
    )


def _check_cancelled(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("stopped between two passes")
