"""What the resident jobs have on the device: a row for each in flat buffers, their examples in one pool."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from models.base.denoiser import Denoiser
from models.lora.adapter import Adapter, Factors, Sites, rank
from models.lora.batched_lora import BatchedAdapter, Layout
from models.lora.trainable import PartialLayout
from privacy.clipping import BoundedGradientSums, even_bounds, stddev
from training.jobs import Examples, TrainJob
from training.optimizer import SGD, AdamW


class BufferSpec(NamedTuple):
    """All that decides the sizes of the buffers, so that they can be kept for the next jobs alike."""

    sites: tuple[str, ...]  # where any of them trains: the others have no room, and no gradient
    rank: int  # largest that is trained
    trains: str  # what of an adapter
    frozen_sites: tuple[str, ...]
    frozen_rank: int  # largest underneath
    common: bool  # whether one frozen adapter lies underneath all
    private: bool
    per_site: bool  # how private jobs clip
    latents: torch.Size  # of one example
    context: torch.Size
    examples: int  # of the job that has most, with those of its prior; of a private one as many as its plan assumes
    stopping: bool  # whether the best adapter is kept beside the last
    optimizer: str
    proximal: bool  # whether any is held to where it started
    corrected: bool  # whether the gradients of any are corrected

    @staticmethod
    def of(jobs: Sequence[TrainJob]) -> BufferSpec:
        """The shape for jobs that agree in their examples' shape, privacy, clip, optimiser and in what is fixed."""
        first = jobs[0]
        return BufferSpec(
            sites=_names(job.start for job in jobs),
            rank=max(rank(job.start) for job in jobs),
            trains=first.trains,
            frozen_sites=_names(job.frozen or {} for job in jobs),
            frozen_rank=max(rank(job.frozen) if job.frozen else 0 for job in jobs),
            common=all(job.frozen is first.frozen for job in jobs),
            private=first.privacy is not None,
            per_site=first.clips_per_site,
            latents=first.examples.latents.shape[1:],
            context=first.examples.context.shape[1:],
            examples=max(map(_held, jobs)),
            stopping=any(job.early_stopping for job in jobs),
            optimizer=first.optimizer,
            proximal=any(job.proximal for job in jobs),
            corrected=any(job.correction is not None for job in jobs),
        )


class CohortBuffers:
    """Buffers for `capacity` resident jobs.

    Attributes:
        adapters: [S, D], what is trained, laid out by `layout`.
        sums: of clipped gradients.
        losses: [S], summed over entries.
        divisors: [S, 1], what a sum is divided by: under DP the plan's public constant.
        latents, context: the pooled examples of resident jobs.
    """

    def __init__(self, base: Denoiser, shape: BufferSpec, capacity: int) -> None:
        like = torch.empty(0, dtype=base.full_precision, device=base.device)
        self.layout = row_layout(base, shape)
        self.adapters = like.new_zeros(capacity, self.layout.size)
        self.optimizer = SGD(self.adapters) if shape.optimizer == "sgd" else AdamW(self.adapters)
        self._starts = torch.zeros_like(self.adapters) if shape.proximal else None
        self._corrections = torch.zeros_like(self.adapters) if shape.corrected else None
        self._proximal = like.new_zeros(capacity, 1)  # μ
        segments = self.layout.site_widths if shape.per_site else [self.layout.size]
        self.sums = BoundedGradientSums(capacity, segments, like=self.adapters, private=shape.private)
        self.losses = like.new_zeros(capacity, dtype=torch.float64)
        self.divisors = like.new_ones(capacity, 1)
        self._frozen_layout, self._common = frozen_layout(base, shape), shape.common
        self._frozen = base.like.new_zeros(1 if shape.common else capacity, self._frozen_layout.size)
        self.latents = like.new_zeros(capacity * shape.examples, *shape.latents)
        self.context = base.like.new_zeros(capacity * shape.examples, *shape.context)
        self._examples = shape.examples
        self._own: list[Tensor | None] = [None] * capacity  # [D] bool, which numbers a job has; None: all
        self._owned = [0] * capacity

    def load(self, jobs: Mapping[int, TrainJob]) -> None:
        """Let jobs in, by row; each was found sound by `check`."""
        rows, entering = list(jobs), list(jobs.values())
        bounds = [clip_bounds(job, self.layout.sites) for job in entering]
        self.sums.reset(rows, bounds, [job.privacy.noise_multiplier if job.privacy else 0.0 for job in entering])
        self.optimizer.reset(rows, [job.learning_rate for job in entering])
        if isinstance(self.layout, PartialLayout):
            self.layout.set_fixed(entering[0].fixed_factors or {})
        index = torch.tensor(rows, device=self.adapters.device)
        self.adapters[index] = self._packed(self.layout, [job.start for job in entering])
        if self._starts is not None:
            self._starts[index] = self.adapters[index]
            self._proximal[index] = self._proximal.new_tensor([[job.proximal] for job in entering])
        if self._corrections is not None:
            self._corrections[index] = self._packed(self.layout, [job.correction for job in entering])
        self.losses[index] = 0.0
        divisors = [[job.batch_size if job.privacy else 1.0] for job in entering]
        self.divisors[index] = torch.tensor(divisors).to(self.divisors)
        if self._frozen_layout.size and self._common:
            self._frozen[0] = self._frozen_layout.pack(entering[0].frozen).to(self._frozen)
        elif self._frozen_layout.size:
            frozen = self._packed(self._frozen_layout, [job.frozen for job in entering])
            self._frozen[index] = frozen.to(self._frozen)
        for row, job in jobs.items():
            mask = None if self.layout.fits(job.start) else self.layout.mask(job.start)
            self._own[row] = None if mask is None else mask.to(self.adapters.device)
            self._owned[row] = self.layout.size if mask is None else int(mask.sum())
            start = self.place(row)
            for pool in _pools(job):
                self.latents[start : start + len(pool)].copy_(pool.latents, non_blocking=True)
                self.context[start : start + len(pool)].copy_(pool.context, non_blocking=True)
                start += len(pool)

    def place(self, row: int) -> int:
        """Where a row's examples begin in the pool."""
        return row * self._examples

    def corrected(self, index: Tensor, gradients: Tensor) -> Tensor:
        """Gradients [R, D] with the terms that no picture enters, and so neither clip nor noise: of FedProx μ (w − w_t)
        (Li et al., 2020, arXiv:1812.06127, eq. 2), of SCAFFOLD c − c_i (Karimireddy et al., 2020, arXiv:1910.06378,
        eq. 3).
        """
        if self._starts is not None:
            gradients = gradients + self._proximal[index] * (self.adapters[index] - self._starts[index])
        return gradients if self._corrections is None else gradients + self._corrections[index]

    def frozen(self, rows: Tensor) -> BatchedAdapter:
        """The frozen adapters of these rows [n]."""
        if not self._frozen_layout.size:
            return {}
        return self._frozen_layout.stacks(self._frozen if self._common else self._frozen[rows])

    def noise(self, row: int, job: TrainJob) -> Tensor | None:
        """Noise in whole steps, int64 [D], from the job's own source, on the numbers that its adapter really has."""
        stddev = self.sums.stddev(row)
        if job.noise is None or not stddev:
            return None
        noise = job.noise.rounded_gaussian(self._owned[row], stddev, self.adapters.device)
        if noise.shape != (self._owned[row],) or noise.dtype != torch.int64:
            raise ValueError(f"client {job.client}: its noise source gave {tuple(noise.shape)} numbers, {noise.dtype}")
        own = self._own[row]
        return noise if own is None else noise.new_zeros(self.layout.size).masked_scatter_(own, noise)

    def _packed(self, layout: Layout, adapters: Sequence[Adapter | None]) -> Tensor:
        """Rows [R, D] of adapters; many jobs start from one and the same, which travels once."""
        distinct = {id(adapter): adapter for adapter in adapters}
        places = {key: place for place, key in enumerate(distinct)}
        packed = torch.stack([layout.pack(adapter) for adapter in distinct.values()]).to(self.adapters)
        return packed[torch.tensor([places[id(adapter)] for adapter in adapters], device=packed.device)]


def check(job: TrainJob, sites: Sites) -> None:
    """Raises ValueError for a job that no row could hold."""
    if job.steps and not job.privacy and not job.pictures:
        raise ValueError(f"client {job.client}: no pictures to train on")
    looked_at = [job.early_stopping.validation] if job.early_stopping else []
    for pool in (*_pools(job), *looked_at):
        alike = all(a.shape[1:] == b.shape[1:] for a, b in zip(pool, job.examples, strict=True))
        if not alike or len(pool.latents) != len(pool.context):
            raise ValueError(f"client {job.client}: examples of different shapes, or without their context")
    if not all(map(len, looked_at)):
        raise ValueError(f"client {job.client}: no validation examples to stop by")
    for name, (a, b) in chain(job.start.items(), (job.frozen or {}).items()):
        site = sites.get(name)
        if site is None or (a.shape[1:], b.shape) != ((site.inputs,), (site.outputs, len(a))):
            raise ValueError(f"client {job.client}: an adapter at {name} that doesn't fit the base")
    for name, added in (job.correction or {}).items():
        if [one.shape for one in added] != [one.shape for one in job.start.get(name, ())]:
            raise ValueError(f"client {job.client}: a correction at {name} that doesn't fit the adapter")
    between: Mapping[str, Factors] = job.start if job.lora_xs_bases is None else job.lora_xs_bases
    for name, wanted in job.start.items():
        given = between.get(name, ())
        if [factor.shape for factor in given] != [factor.shape for factor in wanted]:
            raise ValueError(f"client {job.client}: a frame at {name} that doesn't fit the adapter")
    if job.privacy:
        if not all(factor.isfinite().all() for factors in job.start.values() for factor in factors):
            raise ValueError(f"client {job.client}: starts from numbers that are not finite")
        stddev(clip_bounds(job, job.start), job.privacy.noise_multiplier)


def clip_bounds(job: TrainJob, sites: Iterable[str]) -> list[float]:
    """What the parts of an example's gradient are clipped to; ∞ without privacy."""
    if job.privacy is None:
        return [math.inf]
    if job.clips_per_site:
        return even_bounds(job.privacy.clip, [name in job.start for name in sites])
    return [job.privacy.clip]


def _pools(job: TrainJob) -> list[Examples]:
    return [job.examples, *([job.prior.examples] if job.prior else [])]


def _held(job: TrainJob) -> int:
    """Examples that its row has room for. `client.rounds.train` gives a private job no more pictures than its plan assumes."""
    pictures = max(job.assumed_pictures, job.pictures)
    return pictures * job.views + (len(job.prior.examples) if job.prior else 0)


def _names(adapters: Iterable[Adapter]) -> tuple[str, ...]:
    """The sites of any of these."""
    return tuple(dict.fromkeys(chain.from_iterable(adapters)))


def _at(base: Denoiser, names: Collection[str]) -> Sites:
    """Those of the base's sites that are named, in its order."""
    return {name: site for name, site in base.sites.items() if name in names}


def row_layout(base: Denoiser, shape: BufferSpec) -> Layout:
    """How what is trained lies in a row."""
    sites = _at(base, shape.sites)
    if shape.trains == "both":
        return Layout(sites, shape.rank)
    like = torch.empty(0, dtype=base.full_precision, device=base.device)
    return PartialLayout(sites, shape.rank, shape.trains, like=like)


def frozen_layout(base: Denoiser, shape: BufferSpec) -> Layout:
    """How what is frozen lies in a row of its own."""
    return Layout(_at(base, shape.frozen_sites), shape.frozen_rank)


def common_bytes(base: Denoiser, shape: BufferSpec) -> int:
    """Bytes for a frozen adapter that serves everyone, and twice as many while it is laid out; and for what is fixed
    of a trained one."""
    frozen = 3 * frozen_layout(base, shape).size if shape.common else 0
    fixed = 0 if shape.trains == "both" else Layout(_at(base, shape.sites), shape.rank).size
    return (frozen + fixed) * base.full_precision.itemsize


def row_bytes(base: Denoiser, shape: BufferSpec) -> int:
    """Bytes of the device's memory for one resident job."""
    full_precision, compute = base.full_precision.itemsize, base.dtype.itemsize
    # Adapter, two moments, sum and mask; three more for what is made of them between passes; the best adapter.
    buffers = 8 + shape.stopping + shape.proximal + shape.corrected
    # Integer sums have 8 bytes, and so have the noise and what is made of both: as numbers, and by mask.
    wide = 4 * torch.float64.itemsize if shape.private else 0
    frozen = 0 if shape.common else 3 * frozen_layout(base, shape).size * compute
    example = shape.latents.numel() * full_precision + shape.context.numel() * compute
    return (buffers * full_precision + wide) * row_layout(base, shape).size + frozen + shape.examples * example
