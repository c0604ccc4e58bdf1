"""Buffers of the resident jobs on the device: one row per job in flat matrices, and one pool of examples."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from models.diffusion.denoiser import Denoiser
from models.lora.adapter import Adapter, Factors, Sites, rank
from models.lora.batched_lora import BatchedAdapter, Layout
from models.lora.directions import CoefficientLayout, count
from models.lora.trainable import PartialLayout
from privacy.bounded_sum import Support
from privacy.dp_sgd import BoundedSums, check_bounds, even_bounds
from training.jobs import Examples, TrainJob
from training.optimizer import SGD, AdamW


class BufferSpec(NamedTuple):
    """Settings that determine the sizes of the buffers; later jobs with an equal spec can reuse them."""

    sites: tuple[str, ...]  # sites that any job trains; the others have no space and no gradient
    rank: int  # largest trained rank
    trains: str  # trained factors
    directions: int  # K, if coefficients are trained
    frozen_sites: tuple[str, ...]
    frozen_rank: int  # largest rank of a frozen adapter
    common: bool  # whether all jobs have the same frozen adapter
    private: bool
    per_site: bool  # whether private jobs clip per site
    latents: torch.Size  # shape for one example
    context: torch.Size
    examples: int  # maximum number per job, including its prior; for private jobs the number that the plan assumes
    stopping: bool  # whether any job keeps its best adapter
    optimizer: str
    proximal: bool  # whether any job has a proximal term
    corrected: bool  # whether any job has a correction
    weighted: bool = False  # whether any job has loss weights

    @staticmethod
    def of(jobs: Sequence[TrainJob]) -> BufferSpec:
        """Return the spec for jobs that agree in shape of examples, privacy, clipping, optimizer and fixed factors."""
        first = jobs[0]
        return BufferSpec(
            sites=_site_names(job.start for job in jobs),
            rank=max(rank(job.start) for job in jobs),
            trains=first.trains,
            directions=count(first.directions or {}),
            frozen_sites=_site_names(job.frozen or {} for job in jobs),
            frozen_rank=max(rank(job.frozen) if job.frozen else 0 for job in jobs),
            common=all(job.frozen is first.frozen for job in jobs),
            private=first.privacy is not None,
            per_site=first.clips_per_site,
            latents=first.examples.latents.shape[1:],
            context=first.examples.context.shape[1:],
            examples=max(map(_examples_per_row, jobs)),
            stopping=any(job.early_stopping for job in jobs),
            optimizer=first.optimizer,
            proximal=any(job.proximal for job in jobs),
            corrected=any(job.correction is not None for job in jobs),
            weighted=any(job.loss_weights is not None for job in jobs),
        )


class CohortBuffers:
    """Buffers for `capacity` resident jobs.

    Args:
        base: the base.
        spec: determines the sizes D of a row and of the pool.
        capacity: number of rows S.

    Attributes:
        adapters: [S, D], trained parameters, laid out by `layout`.
        sums: sums of clipped gradients.
        losses: [S], losses summed over entries.
        divisors: [S, 1], divisors of the sums: under DP the plan's public constant.
        latents, context: pooled examples of the resident jobs.
        loss_weights: [examples, h, w] of the pool; None if no job has any.
    """

    def __init__(self, base: Denoiser, spec: BufferSpec, capacity: int) -> None:
        like = torch.empty(0, dtype=base.full_precision, device=base.device)
        self.layout = trained_layout(base, spec)
        self.adapters = like.new_zeros(capacity, self.layout.size)
        self.optimizer = SGD(self.adapters) if spec.optimizer == "sgd" else AdamW(self.adapters)
        self._starts = torch.zeros_like(self.adapters) if spec.proximal else None
        self._corrections = torch.zeros_like(self.adapters) if spec.corrected else None
        self._proximal = like.new_zeros(capacity, 1)  # μ
        segments = self.layout.site_widths if spec.per_site else [self.layout.size]
        self.sums = BoundedSums(capacity, segments, like=self.adapters, private=spec.private)
        self.losses = like.new_zeros(capacity, dtype=torch.float64)
        self.divisors = like.new_ones(capacity, 1)
        self._frozen_layout, self._common = frozen_layout(base, spec), spec.common
        self._frozen = base.like.new_zeros(1 if spec.common else capacity, self._frozen_layout.size)
        self.latents = like.new_zeros(capacity * spec.examples, *spec.latents)
        self.context = base.like.new_zeros(capacity * spec.examples, *spec.context)
        self.loss_weights = like.new_ones(capacity * spec.examples, *spec.latents[1:]) if spec.weighted else None
        self._examples = spec.examples

    def load(self, jobs: Mapping[int, TrainJob]) -> None:
        """Load jobs that passed `check_job`, by row."""
        rows, new_jobs = list(jobs), list(jobs.values())
        bounds = [clip_bounds(job, self.layout.sites) for job in new_jobs]
        noise_multipliers = [job.privacy.noise_multiplier if job.privacy else 0.0 for job in new_jobs]
        self.sums.reset(rows, bounds, noise_multipliers, [self._support(job) for job in new_jobs])
        self.optimizer.reset(rows, [job.learning_rate for job in new_jobs])
        if isinstance(self.layout, PartialLayout):
            self.layout.set_fixed(new_jobs[0].fixed_factors or {})
        if isinstance(self.layout, CoefficientLayout):
            self.layout.set_fixed(new_jobs[0].start, new_jobs[0].directions or {})
        index = torch.tensor(rows, device=self.adapters.device)
        self.adapters[index] = self._packed(self.layout, [job.start for job in new_jobs])
        if self._starts is not None:
            self._starts[index] = self.adapters[index]
            self._proximal[index] = self._proximal.new_tensor([[job.proximal] for job in new_jobs])
        if self._corrections is not None:
            self._corrections[index] = self._packed(self.layout, [job.correction for job in new_jobs])
        self.losses[index] = 0.0
        divisors = [[job.batch_size if job.privacy else 1.0] for job in new_jobs]
        self.divisors[index] = torch.tensor(divisors).to(self.divisors)
        if self._frozen_layout.size and self._common:
            self._frozen[0] = self._frozen_layout.pack(new_jobs[0].frozen).to(self._frozen)
        elif self._frozen_layout.size:
            frozen = self._packed(self._frozen_layout, [job.frozen for job in new_jobs])
            self._frozen[index] = frozen.to(self._frozen)
        for row, job in jobs.items():
            start = self.first_example(row)
            if self.loss_weights is not None:  # 1 changes no bit of the other jobs' losses
                self.loss_weights[start : start + self._examples] = 1.0
                if job.loss_weights is not None:
                    self.loss_weights[start : start + len(job.loss_weights)] = job.loss_weights.to(self.loss_weights)
            for pool in _pools(job):
                self.latents[start : start + len(pool)].copy_(pool.latents, non_blocking=True)
                self.context[start : start + len(pool)].copy_(pool.context, non_blocking=True)
                start += len(pool)

    def first_example(self, row: int) -> int:
        """Return the index in the pool of a row's first example."""
        return row * self._examples

    def add_corrections(self, index: Tensor, gradients: Tensor) -> Tensor:
        """Add terms that don't depend on pictures, and so need neither clipping nor noise, to gradients [R, D].

        FedProx adds μ (w − w_t) (Li et al., 2020, arXiv:1812.06127, eq. 2), and SCAFFOLD c − c_i (Karimireddy et al.,
        2020, arXiv:1910.06378, eq. 3).
        """
        if self._starts is not None:
            gradients = gradients + self._proximal[index] * (self.adapters[index] - self._starts[index])
        return gradients if self._corrections is None else gradients + self._corrections[index]

    def frozen(self, rows: Tensor) -> BatchedAdapter:
        """Return the frozen adapters of these rows [n]."""
        if not self._frozen_layout.size:
            return {}
        return self._frozen_layout.stacks(self._frozen if self._common else self._frozen[rows])

    def _support(self, job: TrainJob) -> Support | None:
        """Return the numbers of a row that a job's adapter has, or None if it has all."""
        if self.layout.fits(job.start):
            return None
        mask = self.layout.mask(job.start)
        return Support(mask.to(self.adapters.device), int(mask.sum()))

    def _packed(self, layout: Layout, adapters: Sequence[Adapter | None]) -> Tensor:
        """Pack adapters to rows [R, D]. Adapters that several jobs share are transferred once."""
        distinct = {id(adapter): adapter for adapter in adapters}
        positions = {key: position for position, key in enumerate(distinct)}
        packed = torch.stack([layout.pack(adapter) for adapter in distinct.values()]).to(self.adapters)
        return packed[torch.tensor([positions[id(adapter)] for adapter in adapters], device=packed.device)]


def check_job(job: TrainJob, sites: Sites) -> None:
    """Raise ValueError for a job that can't be loaded."""
    if job.steps and not job.privacy and not job.pictures:
        raise ValueError(f"client {job.client}: no pictures to train on")
    validation_pools = [job.early_stopping.validation] if job.early_stopping else []
    for pool in (*_pools(job), *validation_pools):
        alike = all(a.shape[1:] == b.shape[1:] for a, b in zip(pool, job.examples, strict=True))
        if not alike or len(pool.latents) != len(pool.context):
            raise ValueError(f"client {job.client}: examples of different shapes, or without context")
    if not all(map(len, validation_pools)):
        raise ValueError(f"client {job.client}: early stopping needs validation examples")
    for name, (a, b) in chain(job.start.items(), (job.frozen or {}).items()):
        site = sites.get(name)
        if site is None or (a.shape[1:], b.shape) != ((site.inputs,), (site.outputs, len(a))):
            raise ValueError(f"client {job.client}: the adapter at {name} doesn't fit the base")
    for name, added in (job.correction or {}).items():
        if [one.shape for one in added] != [one.shape for one in job.start.get(name, ())]:
            raise ValueError(f"client {job.client}: the correction at {name} doesn't fit the adapter")
    bases: Mapping[str, Factors] = job.start if job.lora_xs_bases is None else job.lora_xs_bases
    for name, start in job.start.items() if bases is not job.start else ():
        expected = bases.get(name, ())
        if [factor.shape for factor in expected] != [factor.shape for factor in start]:
            raise ValueError(f"client {job.client}: the LoRA-XS bases at {name} don't fit the adapter")
    for name, directions in (job.directions or {}).items():
        if name not in job.start or directions.shape[1:] != job.start[name].b.shape or not len(directions):
            raise ValueError(f"client {job.client}: the directions at {name} don't fit the adapter")
    if job.directions is not None and job.directions.keys() != job.start.keys():
        raise ValueError(f"client {job.client}: directions and adapter have different sites")
    if job.privacy:
        if not all(factor.isfinite().all() for factors in job.start.values() for factor in factors):
            raise ValueError(f"client {job.client}: the initial adapter is not finite")
        check_bounds(clip_bounds(job, job.start), job.privacy.noise_multiplier)


def clip_bounds(job: TrainJob, sites: Iterable[str]) -> list[float]:
    """Return the clipping norms of the parts of an example's gradient; ∞ without privacy."""
    if job.privacy is None:
        return [math.inf]
    if job.clips_per_site:
        return even_bounds(job.privacy.clip, [name in job.start for name in sites])
    return [job.privacy.clip]


def _pools(job: TrainJob) -> list[Examples]:
    return [job.examples, *([job.prior.examples] if job.prior else [])]


def _examples_per_row(job: TrainJob) -> int:
    """Return the number of examples that a row has space for.

    `client.rounds.train` gives a private job at most as many pictures as its plan assumes.
    """
    pictures = max(job.assumed_pictures, job.pictures)
    return (len(job.examples) if job.variants else pictures * job.views) + (len(job.prior.examples) if job.prior else 0)


def _site_names(adapters: Iterable[Adapter]) -> tuple[str, ...]:
    """Return the sites of any of these adapters, in order of first appearance."""
    return tuple(dict.fromkeys(chain.from_iterable(adapters)))


def _named_sites(base: Denoiser, names: Collection[str]) -> Sites:
    """Return the base's sites with these names, in the base's order."""
    return {name: site for name, site in base.sites.items() if name in names}


def trained_layout(base: Denoiser, spec: BufferSpec) -> Layout:
    """Return the layout of the trained parameters in a row."""
    sites = _named_sites(base, spec.sites)
    if spec.trains == "both":
        return Layout(sites, spec.rank)
    like = torch.empty(0, dtype=base.full_precision, device=base.device)
    if spec.trains == "coefficients":
        return CoefficientLayout(sites, spec.rank, spec.directions, like=like)
    return PartialLayout(sites, spec.rank, spec.trains, like=like)


def frozen_layout(base: Denoiser, spec: BufferSpec) -> Layout:
    """Return the layout of a frozen adapter in a row."""
    return Layout(_named_sites(base, spec.frozen_sites), spec.frozen_rank)


def shared_bytes(base: Denoiser, spec: BufferSpec) -> int:
    """Compute the bytes of a frozen adapter that all jobs share, with its copies during loading, and of fixed
    factors."""
    frozen = 3 * frozen_layout(base, spec).size if spec.common else 0
    sites = _named_sites(base, spec.sites)
    fixed = 0 if spec.trains == "both" else Layout(sites, spec.rank).size
    if spec.directions:
        fixed += (spec.directions - 1) * spec.rank * sum(site.outputs for site in sites.values())
    return (frozen + fixed) * base.full_precision.itemsize


def row_bytes(base: Denoiser, spec: BufferSpec) -> int:
    """Compute the bytes on the device for one resident job."""
    full_precision, compute = base.full_precision.itemsize, base.dtype.itemsize
    # Adapter, two moments, sum and mask; three temporaries between passes; the best adapter.
    buffers = 8 + spec.stopping + spec.proximal + spec.corrected
    # Sums, noise, and two temporaries (as numbers, and by mask) have 8 bytes per number.
    integer_bytes = 4 * torch.float64.itemsize if spec.private else 0
    frozen = 0 if spec.common else 3 * frozen_layout(base, spec).size * compute
    positions = spec.latents[1:].numel() if spec.weighted else 0
    example = (spec.latents.numel() + positions) * full_precision + spec.context.numel() * compute
    return (
        (buffers * full_precision + integer_bytes) * trained_layout(base, spec).size + frozen + spec.examples * example
    )
