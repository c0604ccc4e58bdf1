"""The cohort against a plain loop: merged weights, torch.optim.AdamW, one client at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from models.adapter import Adapter, Factors, head_and_tail, initial
from models.base import Base
from models.objective import noised, target
from models.slots import stack_adapters
from privacy.noise import Simulated, stream
from training.batches import Batches
from training.inference import held_out_losses
from training.jobs import DPSGD, EarlyStopping, Examples, Train, Trained
from training.trainer import train


def examples(base: Base, count: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(
        torch.randn(count, *base.shape, generator=generator), torch.randn(count, 8, 16, generator=generator)
    )


def live(base: Base, rank: int, seed: int) -> Adapter:
    """An adapter whose B is not zero, so that every factor has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(f.a, 0.1 * torch.randn(f.b.shape, generator=generator))
        for name, f in initial(base.sites, rank, seed).items()
    }


def job(base: Base, client: str, rank: int = 2, count: int = 5, **changes: object) -> Train:
    plain = Train(
        client=client, round=1, purpose="shared", seed=0, examples=examples(base, count, stream(client)),
        start=live(base, rank, 1), steps=4, batch_size=3, learning_rate=1e-2,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def private(base: Base, client: str, rate: float = 0.6, **changes: object) -> Train:
    privacy = DPSGD(noise_multiplier=0.5, clip=0.05, sampling_rate=rate, draws=2)
    noise = Simulated(seed=3, client=client, round=1, purpose="shared")
    return job(base, client, privacy=privacy, noise=noise, names=tuple("abcde"), **changes)


class Reference:
    """One client, W + B A merged into the weights of an untouched UNet, optimised by torch."""

    def __init__(self, base: Base, job: Train) -> None:
        self.base, self.job = base, job
        self.unet = UNet2DConditionModel.from_pretrained(base.folder / "unet").requires_grad_(False).eval()
        self.factors = {
            name: (f.a.clone().requires_grad_(), f.b.clone().requires_grad_()) for name, f in job.start.items()
        }
        self.parameters = [p for pair in self.factors.values() for p in pair]

    def loss(self, pictures: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        merged = {}
        for name, (a, b) in self.factors.items():
            weight = self.unet.get_parameter(f"{name}.weight") + b @ a
            if self.job.frozen:
                weight = weight + self.job.frozen[name].b @ self.job.frozen[name].a
            merged[f"{name}.weight"] = weight
        x0, context = self.job.examples.latents[pictures], self.job.examples.context[pictures]
        x = noised(self.base.schedule, x0, noise, t)
        output = torch.func.functional_call(self.unet, merged, (x, t), {"encoder_hidden_states": context}).sample
        return (output - target(self.base.schedule, x0, noise, t)).square().mean()

    def gradients(self, batch: tuple[Tensor, Tensor, Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(self.loss(*batch), self.parameters)

    def private_gradients(self, batch: tuple[Tensor, Tensor, Tensor], noise: Simulated) -> Sequence[Tensor]:
        pictures, t, epsilon = batch
        privacy = self.job.privacy
        assert privacy
        total = [torch.zeros_like(p) for p in self.parameters]
        for i, picture in enumerate(pictures):
            mine = slice(i * privacy.draws, (i + 1) * privacy.draws)
            repeated = picture.repeat(privacy.draws)
            found = self.gradients((repeated, t[mine], epsilon[mine]))
            norm = torch.cat([g.flatten() for g in found]).norm()
            total = [s + g * min(1.0, privacy.clip / float(norm)) for s, g in zip(total, found, strict=True)]
        flat = noise.gaussian(sum(p.numel() for p in self.parameters)) * privacy.noise_multiplier * privacy.clip
        noises = flat.split([p.numel() for p in self.parameters])
        return [(s + n.view_as(s)) / self.job.batch_size for s, n in zip(total, noises, strict=True)]

    def train(self) -> Adapter:
        batches = Batches(self.job, len(self.base.schedule))
        optimiser = torch.optim.AdamW(self.parameters, lr=self.job.learning_rate, weight_decay=0)
        for _ in range(self.job.steps):
            batch = batches.next()
            if self.job.privacy:
                assert isinstance(self.job.noise, Simulated)
                found = self.private_gradients(batch, self.job.noise)
            else:
                found = self.gradients(batch)
            for parameter, gradient in zip(self.parameters, found, strict=True):
                parameter.grad = gradient
            optimiser.step()
        return {name: Factors(a.detach(), b.detach()) for name, (a, b) in self.factors.items()}


def assert_close(found: Trained | Exception, wanted: Adapter, start: Adapter) -> None:
    """The change of every factor agrees to 1e-3 of its norm."""
    assert isinstance(found, Trained)
    assert found.adapter.keys() == wanted.keys()
    for name, factors in wanted.items():
        for got, want, was in zip(found.adapter[name], factors, start[name], strict=True):
            assert (got - want).norm() <= 1e-3 * (want - was).norm() + 1e-7, name


@pytest.mark.parametrize("micro_batch", [2, 5, 64])
def test_mixed_cohort_equals_the_plain_loop(base: Base, micro_batch: int) -> None:
    frozen = live(base, 3, 9)
    jobs = [
        job(base, "plain"),
        job(base, "longer, higher rank", rank=4, steps=6, batch_size=4, learning_rate=3e-3),
        job(base, "on top of a frozen adapter", frozen=frozen),
        job(base, "one picture", count=1),
    ]
    for found, plan in zip(train(base, jobs, micro_batch=micro_batch, timesteps=2), jobs, strict=True):
        assert_close(found, Reference(base, plan).train(), plan.start)


@pytest.mark.parametrize("micro_batch", [2, 64])
def test_private_cohort_equals_clip_each_picture_then_noise_the_sum(base: Base, micro_batch: int) -> None:
    def jobs() -> list[Train]:  # noise sources are consumed: a fresh set for each side
        return [private(base, "a"), private(base, "b", rank=3, steps=5), job(base, "c"), private(base, "d", rate=0.05)]

    for found, plan in zip(train(base, jobs(), micro_batch=micro_batch, timesteps=2), jobs(), strict=True):
        assert_close(found, Reference(base, plan).train(), plan.start)


def test_an_empty_poisson_batch_is_noise_alone(base: Base) -> None:
    plan = private(base, "nobody", rate=0.0, steps=1)
    (found,) = train(base, [plan], micro_batch=8, timesteps=2)
    assert isinstance(found, Trained)
    assert found.loss != found.loss  # NaN: no example was seen
    moved = torch.cat([(f.a - plan.start[name].a).flatten() for name, f in found.adapter.items()])
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, plan.learning_rate), rtol=0.1, atol=0)  # Adam's ε


def test_a_client_does_not_depend_on_its_company(base: Base) -> None:
    alone = train(base, [job(base, "a")], micro_batch=8, timesteps=2)[0]
    together = train(base, [job(base, "b"), job(base, "a"), job(base, "c", rank=4)], micro_batch=8, timesteps=2)[1]
    assert isinstance(alone, Trained)
    assert isinstance(together, Trained)
    assert_close(together, alone.adapter, job(base, "a").start)


def test_the_same_jobs_give_the_same_bits(base: Base) -> None:
    one, two = (train(base, [job(base, "a"), private(base, "b")], micro_batch=4, timesteps=2) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        assert isinstance(first, Trained)
        assert isinstance(second, Trained)
        for name in first.adapter:
            assert torch.equal(first.adapter[name].a, second.adapter[name].a)
            assert torch.equal(first.adapter[name].b, second.adapter[name].b)


def test_nan_pictures_fail_their_own_job_only(base: Base) -> None:
    broken = job(base, "broken")
    broken = dataclasses.replace(
        broken, examples=Examples(broken.examples.latents * torch.nan, broken.examples.context)
    )
    fine = job(base, "fine")
    failed, found = train(base, [broken, fine], micro_batch=16, timesteps=2)
    assert isinstance(failed, Exception)
    assert "broken" in str(failed)
    assert_close(found, Reference(base, fine).train(), fine.start)


def test_early_stopping_keeps_the_best_look(base: Base) -> None:
    """Against runs of every length that was looked at."""
    validation, every = examples(base, 4, 77), 2
    stopping = EarlyStopping(validation=validation, every=every, patience=2)
    plan = job(base, "a", learning_rate=3e-2, steps=9)
    looks = [*range(0, plan.steps, every), plan.steps]
    lengths = [train(base, [dataclasses.replace(plan, steps=n)], micro_batch=16, timesteps=2)[0] for n in looks]
    losses = []
    for result in lengths:
        assert isinstance(result, Trained)
        stacks = stack_adapters(base.sites, [result.adapter])
        losses += held_out_losses(base, [validation], [stacks], timesteps=2, micro_batch=16)
    best, stop = 0, len(looks) - 1
    for look, loss in enumerate(losses):
        best = look if loss < losses[best] else best
        if look - best >= stopping.patience:
            stop = look
            break
    (found,) = train(base, [dataclasses.replace(plan, early_stopping=stopping)], micro_batch=16, timesteps=2)
    assert isinstance(found, Trained)
    assert found.steps == looks[stop]
    wanted = lengths[best]
    assert isinstance(wanted, Trained)
    for name, factors in found.adapter.items():
        assert torch.equal(factors.b, wanted.adapter[name].b)


def test_early_stopping_is_refused_for_private_jobs(base: Base) -> None:
    with pytest.raises(ValueError, match="private job"):
        private(base, "a", early_stopping=EarlyStopping(validation=examples(base, 1, 0), every=1, patience=1))


def test_no_jobs(base: Base) -> None:
    assert train(base, [], micro_batch=8, timesteps=2) == []
    assert held_out_losses(base, [], [], timesteps=2, micro_batch=8) == []


def test_head_trains_and_tail_stays(base: Base) -> None:
    head, tail = head_and_tail(live(base, 4, 5), 2)
    plan = job(base, "a", start=head, frozen=tail)
    (found,) = train(base, [plan], micro_batch=8, timesteps=2)
    assert_close(found, Reference(base, plan).train(), head)
