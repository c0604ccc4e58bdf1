"""The loss of each example is independent of the others, to the last bit, and so is each generated image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.seeding import derive_seed
from models.base.base import Base
from models.diffusion.denoiser import Denoise
from models.diffusion.objective import add_noise, per_example_loss, target
from models.diffusion.sampling import SAMPLERS
from models.lora.batched_lora import BatchedAdapter, stack_adapters
from tests.helpers.reference_trainer import PLENTY, examples, nonzero_adapter
from training.engine import perform
from training.inference import each_loss, generate
from training.jobs import Cancelled, EncodeJob, Examples, GenerateJob, MeasureEachJob, MeasureJob, Picture

TIMESTEPS = 3


def measure(base: Base, pool: Examples, *, memory: int = PLENTY) -> torch.Tensor:
    (result,) = each_loss(
        base, [pool], [stack_adapters(base.sites, [nonzero_adapter(base, 2, 1)])], timesteps=TIMESTEPS, memory=memory
    )
    return result


def without(pool: Examples, place: int) -> Examples:
    rest = [other for other in range(len(pool)) if other != place]
    return Examples(pool.latents[rest], pool.context[rest])


def test_losses_match_single_evaluations(fine: Base) -> None:
    pool = examples(fine, 4, 7)
    stacks = stack_adapters(fine.sites, [nonzero_adapter(fine, 2, 1)])
    noises = torch.randn(
        TIMESTEPS, *pool.latents.shape[1:], generator=torch.Generator().manual_seed(derive_seed("held-out"))
    )
    expected = torch.zeros(4, dtype=torch.float64)
    for k in range(4):
        for look in range(TIMESTEPS):
            t = torch.tensor([int((look + 0.5) / TIMESTEPS * len(fine.schedule))])
            x0, epsilon = pool.latents[k : k + 1], noises[look : look + 1].double()
            with torch.no_grad(), fine.use_adapters([stacks]) as denoise:
                output = denoise(add_noise(fine.schedule, x0, epsilon, t), t, pool.context[k : k + 1])
            expected[k] += per_example_loss(output, target(fine.schedule, x0, epsilon, t))[0] / TIMESTEPS
    torch.testing.assert_close(measure(fine, pool), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("memory", [1, PLENTY])
def test_losses_are_independent_of_other_examples(base: Base, memory: int) -> None:
    pool = examples(base, 5, 7)
    whole = measure(base, pool, memory=memory)
    for index in range(len(pool)):
        rest = measure(base, without(pool, index), memory=memory)
        assert torch.equal(rest, torch.cat([whole[:index], whole[index + 1 :]]))


def test_no_pass_holds_two_examples(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a layer gives the same bits in a batch of another size depends on the machine, so it is not relied on."""
    use_adapters, passes = base.use_adapters, []

    @contextmanager
    def watched(adapters: Sequence[BatchedAdapter]) -> Iterator[Denoise]:
        with use_adapters(adapters) as denoise:

            def look(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
                passes.append(context)
                return denoise(x, t, context)

            yield look

    pool = examples(base, 4, 7)
    measure(base, pool)  # measuring the memory of a pass is a pass too
    monkeypatch.setattr(base, "use_adapters", watched)
    measure(base, pool)
    assert [len(context) for context in passes] == [TIMESTEPS] * 4
    for context, own in zip(passes, pool.context, strict=True):
        assert torch.equal(context, own.expand_as(context))


def test_losses_are_independent_of_order(base: Base) -> None:
    pool = examples(base, 5, 7)
    turned = Examples(pool.latents.flip(0), pool.context.flip(0))
    assert torch.equal(measure(base, turned), measure(base, pool).flip(0))


def test_jobs_of_all_kinds_together(base: Base) -> None:
    one, other, adapter = examples(base, 2, 7), examples(base, 3, 8), nonzero_adapter(base, 2, 1)
    jobs = [
        MeasureEachJob(examples=one, adapter=None),
        MeasureJob(examples=one, adapter=None),
        MeasureEachJob(examples=other, adapter=adapter),
        MeasureEachJob(examples=one, adapter=adapter),
    ]
    found = perform(base, jobs, memory=PLENTY, timesteps=TIMESTEPS)
    assert [getattr(result, "shape", None) for result in found] == [(2,), None, (3,), (2,)]
    stacks = stack_adapters(base.sites, [adapter])
    (single,) = each_loss(base, [other], [stacks], timesteps=TIMESTEPS, memory=PLENTY)
    torch.testing.assert_close(found[2], single)
    assert not torch.equal(found[0], found[3])


@pytest.mark.parametrize(("kind", "passes"), [(MeasureJob, 8), (MeasureEachJob, 8), (EncodeJob, 3), (GenerateJob, 1)])
def test_cancellation_before_any_pass(base: Base, kind: Any, passes: int) -> None:
    """No further pass runs, and no other job is affected."""
    pool = examples(base, 2, 7)
    picture = Picture(np.zeros((16, 16), np.uint8), "a")
    job: Any = {
        MeasureJob: lambda: MeasureJob(examples=pool, adapter=None),
        MeasureEachJob: lambda: MeasureEachJob(examples=pool, adapter=None),
        EncodeJob: lambda: EncodeJob(pictures=[picture]),
        GenerateJob: lambda: GenerateJob(captions=["a"], adapters=[], seed=1, steps=2),
    }[kind]()
    for last in range(passes + 1):
        asked = count()

        def cancelled(asked: Iterator[int] = asked, last: int = last) -> bool:
            return next(asked) >= last

        (result,) = perform(base, [job], memory=4, timesteps=4, cancelled=cancelled)
        assert isinstance(result, Cancelled) == (last < passes)
        assert next(asked) == min(last + 1, passes)


def test_no_examples(base: Base) -> None:
    assert each_loss(base, [], [], timesteps=2, memory=PLENTY) == []
    empty = examples(base, 0, 1)
    (result,) = each_loss(base, [empty], [], timesteps=2, memory=PLENTY)
    assert result.shape == (0,)


@pytest.mark.integration
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_is_independent_of_others(base: Base, sampler: str) -> None:
    """It depends on its caption, seed and slot only, for any batch and pass size."""
    adapters = [stack_adapters(base.sites, [nonzero_adapter(base, 2, 1), nonzero_adapter(base, 2, 2)])]
    captions, seeds, slots = ["a 1", "b 2", "a 1", "a 1"], [5, 6, 5, 7], [0, 1, 0, 0]
    settings: dict[str, Any] = {"sampler": sampler, "steps": 3, "guidance": 2.0}
    together = generate(base, captions, seeds, adapters, slots, memory=PLENTY, **settings)
    torch.testing.assert_close(generate(base, captions, seeds, adapters, slots, memory=1, **settings), together)
    torch.testing.assert_close(together[0], together[2])
    single = generate(base, captions[1:2], seeds[1:2], adapters, slots[1:2], memory=PLENTY, **settings)
    torch.testing.assert_close(single[0], together[1])
    other = generate(base, captions[1:2], seeds[1:2], adapters, [0], memory=PLENTY, **settings)
    assert not torch.allclose(other, single, atol=1e-3)
    assert not torch.allclose(together[0], together[3], atol=1e-3)


@pytest.mark.integration
def test_guides_have_the_slots_of_the_adapters(base: Base) -> None:
    """Each image is guided by its own slot; by its own adapter, that is classifier-free guidance."""
    adapters = [stack_adapters(base.sites, [nonzero_adapter(base, 2, 1), nonzero_adapter(base, 2, 2)])]
    guides = [stack_adapters(base.sites, [nonzero_adapter(base, 2, 1), None])]
    settings: dict[str, Any] = {"sampler": "dpm", "steps": 3, "guidance": 2.0, "memory": PLENTY}
    captions, seeds, slots = ["a 1", "b 2"], [5, 6], [0, 1]
    plain = generate(base, captions, seeds, adapters, slots, **settings)
    guided = generate(base, captions, seeds, adapters, slots, guides=guides, **settings)
    torch.testing.assert_close(guided[0], plain[0])
    assert not torch.allclose(guided[1], plain[1], atol=1e-3)
    unguided = settings | {"guidance": 1.0}
    torch.testing.assert_close(
        generate(base, captions, seeds, adapters, slots, guides=guides, **unguided),
        generate(base, captions, seeds, adapters, slots, **unguided),
    )
