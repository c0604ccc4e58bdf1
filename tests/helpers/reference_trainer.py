"""Training jobs, and a reference trainer: one client at a time, merged weights, torch.optim.AdamW."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from common import counter_rng
from common.seeding import derive_seed
from models.base.base import Base
from models.diffusion.objective import add_noise, target
from models.lora.adapter import Adapter, Factors, init_adapter
from privacy.bounded_sum import RESOLUTION
from privacy.noise import SimulatedNoise
from training.batches import BatchSampler, StepBatch
from training.buffers import BufferSpec, row_bytes
from training.capacity import InsufficientMemoryError, capacity, entry_bytes
from training.jobs import DPSGD, Examples, TrainedAdapter, TrainJob

PLENTY = 2**30


def examples(base: Base, count: int, seed: int, side: int = 8) -> Examples:
    """Latents and contexts from a normal distribution, in the base's precision."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, base.shape[0], side, side, generator=generator)
    return Examples(
        latents.to(base.full_precision), torch.randn(count, 8, 16, generator=generator).to(base.full_precision)
    )


def nonzero_adapter(base: Base, rank: int, seed: int) -> Adapter:
    """An adapter whose B is not zero, so that every factor has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            f.a.to(base.full_precision), 0.1 * torch.randn(f.b.shape, generator=generator).to(base.full_precision)
        )
        for name, f in init_adapter(base.sites, rank, seed).items()
    }


def random_bases(base: Base, rank: int, seed: int) -> Adapter:
    """Orthonormal factors A and L for every site."""
    generator = torch.Generator().manual_seed(seed)

    def columns(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, rank, generator=generator).to(base.full_precision)).Q

    return {name: Factors(columns(site.inputs).T, columns(site.outputs)) for name, site in base.sites.items()}


def at_some_sites(adapter: Adapter, every: int = 2) -> Adapter:
    """The adapter at every n-th site only."""
    return {name: adapter[name] for name in list(adapter)[::every]}


def job(base: Base, client: str, rank: int = 2, count: int = 5, **changes: object) -> TrainJob:
    plain = TrainJob(
        client=client,
        round=1,
        purpose="shared",
        seed=0,
        examples=examples(base, count, derive_seed(client)),
        start=nonzero_adapter(base, rank, 1),
        steps=4,
        batch_size=3,
        learning_rate=1e-2,
    )
    return dataclasses.replace(plain, **changes)


def private(base: Base, client: str, rate: float = 0.6, count: int = 5, **changes: object) -> TrainJob:
    """A private job, new in each call: training uses up its noise source."""
    names = [field.name for field in dataclasses.fields(DPSGD)]
    kinds = {"noise_multiplier": 0.02, "clip": 0.025, "sampling_rate": rate, "draws": 2}  # about half are clipped
    privacy = DPSGD(**kinds | {name: changes.pop(name) for name in names if name in changes})
    views = changes.get("views", 1)
    assert isinstance(views, int)
    noise = SimulatedNoise(seed=3, client=client, round=1, purpose="shared")
    keys = tuple(f"{client} {index}" for index in range(count))
    return job(base, client, count=count * views, **{"privacy": privacy, "noise": noise, "names": keys} | changes)


def minimum_memory(base: Base, jobs: Sequence[TrainJob]) -> int:
    """The least memory in which these jobs train, one job and one entry at a time."""
    low, high = 0, PLENTY  # insufficient, and sufficient
    while high - low > 1:
        middle = (low + high) // 2
        try:
            capacity(base, jobs, middle)
        except InsufficientMemoryError:
            low = middle
        else:
            high = middle
    return high


def memory_for(base: Base, jobs: Sequence[TrainJob], entries: int, residents: int | None = None) -> int:
    """Memory for the given numbers of entries and of resident jobs (default: all)."""
    jobs = sorted(jobs, key=lambda job: job.privacy is None)  # private jobs have larger rows
    shape = BufferSpec.of(jobs)
    more = (len(jobs) if residents is None else residents) - 1
    return minimum_memory(base, jobs) + more * row_bytes(base, shape) + (entries - 1) * entry_bytes(base, shape)


@cache
def untouched(folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel.from_pretrained(folder / "unet")
    return nn.Module.to(unet.requires_grad_(False).eval(), dtype)


class Reference:
    """Train one client with W + B A merged into the weights of an unmodified UNet, by torch's own optimizers."""

    def __init__(self, base: Base, job: TrainJob) -> None:
        self.base, self.job = base, job
        self.unet = untouched(base.folder, base.full_precision)
        pools = [job.examples, *([job.prior.examples] if job.prior else [])]
        self.latents, self.context = (torch.cat(values) for values in zip(*pools, strict=True))
        names = [name for name in base.sites if name in job.start]
        self.factors = {name: [f.detach().clone().requires_grad_() for f in job.start[name]] for name in names}
        match job.trains:
            case "both":
                self.parameters = [factor for pair in self.factors.values() for factor in pair]
            case "a":
                self.parameters = [a for a, _ in self.factors.values()]
            case "b":
                self.parameters = [b for _, b in self.factors.values()]
        if job.lora_xs_bases:
            self.parameters = [
                (job.lora_xs_bases[name].b.T @ job.start[name].b).clone().requires_grad_() for name in names
            ]
        self.all_losses: list[Tensor] = []  # losses of all entries
        self.scales: list[float] = []  # clipping factors

    def now(self) -> Adapter:
        """The factors that the current parameters represent."""
        if self.job.lora_xs_bases is None:
            return {name: Factors(a, b) for name, (a, b) in self.factors.items()}
        between = {name: self.job.lora_xs_bases[name] for name in self.factors}
        return {
            name: Factors(a, left @ core)
            for (name, (a, left)), core in zip(between.items(), self.parameters, strict=True)
        }

    def losses(self, batch: StepBatch) -> Tensor:
        """Loss of every entry [n]."""
        merged = {name: b @ a for name, (a, b) in self.now().items()}
        for name, factors in (self.job.frozen or {}).items():
            merged[name] = merged.get(name, 0.0) + factors.b @ factors.a
        weights = {f"{name}.weight": self.unet.get_parameter(f"{name}.weight") for name in merged}
        changed = {key: weight + merged[key.removesuffix(".weight")].view_as(weight) for key, weight in weights.items()}
        x, t, context, expected = self.seen(batch)
        output = torch.func.functional_call(self.unet, changed, (x, t), {"encoder_hidden_states": context}).sample
        squares = (output - expected).square()
        if self.job.loss_weights is not None:
            own = len(self.job.examples)
            for entry, example in enumerate(batch.examples):
                if example < own:
                    squares[entry] *= self.job.loss_weights[example].to(squares)
        return squares.flatten(1).mean(1)

    def seen(self, batch: StepBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noised latents x_t, timesteps, contexts, and targets."""
        x0, context = self.latents[batch.examples], self.context[batch.examples]
        t = torch.from_numpy((batch.phases * len(self.base.schedule)).astype(int))
        noise = counter_rng.normals(torch.from_numpy(batch.noise_keys), x0[0].numel()).to(x0).view_as(x0)
        schedule = self.base.schedule
        return add_noise(schedule, x0, noise, t), t, context, target(schedule, x0, noise, t)

    def objective(self, batch: StepBatch) -> Tensor:
        """Mean loss over draws, plus that of their prior partners."""
        losses, own = self.losses(batch), torch.from_numpy(batch.examples) < len(self.job.examples)
        self.all_losses.append(losses.detach())
        if self.job.prior is None:
            return losses.mean()
        return losses[own].mean() + self.job.prior.weight * losses[~own].mean()

    def gradients(self, batch: StepBatch) -> list[Tensor]:
        return list(torch.autograd.grad(self.objective(batch), self.parameters)) if self.parameters else []

    def unit_gradients(self, batch: StepBatch) -> list[list[Tensor]]:
        """Gradients of each picture."""
        privacy = self.job.privacy
        assert privacy
        unit = privacy.draws * (2 if self.job.prior else 1)
        return [self.gradients(batch.part(slice(start, start + unit))) for start in range(0, batch.size, unit)]

    def clipped(self, gradients: list[Tensor]) -> list[Tensor]:
        privacy = self.job.privacy
        assert privacy
        if not all(gradient.isfinite().all() for gradient in gradients):
            return [torch.zeros_like(gradient) for gradient in gradients]
        each = 2 if self.job.trains == "both" else 1
        pairs = [gradients[index : index + each] for index in range(0, len(gradients), each)]
        parts = pairs if privacy.per_site else [gradients]
        bound = privacy.clip / len(pairs) ** 0.5 if privacy.per_site else privacy.clip
        norms = [float(torch.cat([gradient.flatten() for gradient in part]).norm()) for part in parts]
        scales = [min(1.0, bound / norm) if norm else 1.0 for norm in norms]
        self.scales += scales
        step = privacy.clip / RESOLUTION or 1.0
        return [
            (gradient * (scale * (1 - 2.0**-18) / step)).trunc() * step
            for part, scale in zip(parts, scales, strict=True)
            for gradient in part
        ]

    def private_gradients(self, batch: StepBatch) -> list[Tensor]:
        privacy, noise = self.job.privacy, self.job.noise
        assert privacy
        assert noise
        sums = [torch.zeros_like(p) for p in self.parameters]
        for gradients in self.unit_gradients(batch):
            sums = [s + g for s, g in zip(sums, self.clipped(gradients), strict=True)]
        sizes = [p.numel() for p in self.parameters]
        steps = torch.zeros(sum(sizes), dtype=torch.int64)
        if privacy.noise_multiplier and privacy.clip:
            steps = noise.rounded_gaussian(sum(sizes), privacy.noise_multiplier * RESOLUTION)
        flat = (steps.double() * (privacy.clip / RESOLUTION)).to(self.base.full_precision)
        return [(s + n.view_as(s)) / self.job.batch_size for s, n in zip(sums, flat.split(sizes), strict=True)]

    def corrections(self) -> list[Tensor]:
        """The correction of the gradient of each parameter."""
        given = self.job.correction
        if given is None:
            return [torch.zeros_like(p) for p in self.parameters]
        if self.job.lora_xs_bases:
            return [self.job.lora_xs_bases[name].b.T @ given[name].b for name in self.factors]
        trained_adapter = {"both": ("a", "b"), "a": ("a",), "b": ("b",)}[self.job.trains]
        return [getattr(given[name], factor) for name in self.factors for factor in trained_adapter]

    @property
    def share_clipped(self) -> float:
        return sum(scale < 1 for scale in self.scales) / len(self.scales)

    def train(self) -> Adapter:
        batches = BatchSampler(self.job)
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[self.job.optimizer]
        optimizer = kind([*self.parameters, torch.zeros(1)], lr=self.job.learning_rate, weight_decay=0)
        starts, added = [p.detach().clone() for p in self.parameters], self.corrections()
        for _ in range(self.job.steps):
            batch = batches.next()
            result = self.private_gradients(batch) if self.job.privacy else self.gradients(batch)
            for parameter, gradient, start, extra in zip(self.parameters, result, starts, added, strict=True):
                parameter.grad = gradient + self.job.proximal * (parameter.detach() - start) + extra
            optimizer.step()
        return {name: Factors(a.detach(), b.detach()) for name, (a, b) in self.now().items()}


def relative_change_error(found: TrainedAdapter | Exception, wanted: Adapter, start: Adapter) -> float:
    """Largest error of the change of a factor, relative to its norm."""
    assert isinstance(found, TrainedAdapter), found
    assert found.adapter.keys() == wanted.keys() == start.keys()
    worst = 0.0
    for name, factors in wanted.items():
        for got, want, was in zip(found.adapter[name], factors, start[name], strict=True):
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            if got.numel():
                assert got.isfinite().all()
                worst = max(worst, float((got - want).norm() / (want - was).norm().clamp_min(1e-4)))
    return worst


def assert_close(found: TrainedAdapter | Exception, wanted: Adapter, start: Adapter, within: float = 1e-3) -> None:
    """Assert that the change of every factor agrees up to a relative error."""
    assert relative_change_error(found, wanted, start) <= within


def trained_adapter(found: TrainedAdapter | Exception) -> Adapter:
    """The adapter of a job that succeeded."""
    assert isinstance(found, TrainedAdapter), found
    return found.adapter


def assert_same_bits(one: TrainedAdapter | Exception, other: TrainedAdapter | Exception) -> None:
    first, second = trained_adapter(one), trained_adapter(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name].a, second[name].a)
        assert torch.equal(first[name].b, second[name].b)
