"""Per-example gradients, compared with Opacus' hooks on a peft model, and with autograd on one example at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.lib.tiny import ATTENTION
from models.base.base import Base
from tests.helpers.reference_trainer import (
    PLENTY,
    Reference,
    assert_close,
    at_some_sites,
    examples,
    job,
    memory_for,
    nonzero_adapter,
    private,
    trained_adapter,
)
from training.batches import BatchSampler, EntryQueue, StepBatch
from training.buffers import BufferSpec, CohortBuffers
from training.cohort import train
from training.jobs import Prior, TrainJob
from training.passes import gradients, on_device

EVERY_KIND = (
    r".*(attn[12]\.to_(q|out\.0)|ff\.net.*|time_emb.*|conv1|conv_shortcut|proj_in|downsamplers\.0\.conv|conv_out)"
)

quiet = pytest.mark.filterwarnings("ignore:Full backward hook")


class _OpacusReference(Reference):
    """Reference client with diffusers' `add_adapter`, and per-example gradients from Opacus' hooks."""

    def __init__(self, base: Base, job: TrainJob) -> None:
        from diffusers import UNet2DConditionModel
        from opacus import GradSampleModule
        from peft import LoraConfig

        super().__init__(base, job)
        unet: Any = UNet2DConditionModel.from_pretrained(base.folder / "unet").requires_grad_(False)
        rank = next(iter(job.start.values())).a.shape[0]
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(job.start)))
        for name, pair in job.start.items():
            layer = unet.get_submodule(name)
            weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            for weight, factor in zip(weights, pair, strict=True):
                weight.data = factor.clone().view_as(weight)
            self.factors[name] = list(weights)
        self.parameters = [weight for pair in self.factors.values() for weight in pair]
        assert sum(weight.requires_grad for weight in unet.parameters()) == len(self.parameters)
        self.hooked = GradSampleModule(unet.train())  # its hooks are silent in eval(); there is no dropout

    def entry_gradients(self, batch: StepBatch) -> list[Tensor]:
        """Return the gradients of every parameter [n, …]."""
        x, t, context, expected = self.seen(batch)
        output = self.hooked(x, t, encoder_hidden_states=context).sample
        self.hooked.zero_grad()
        (output - expected).square().flatten(1).mean(1).mean().backward()
        return [weight.grad_sample.detach() for weight in self.parameters]  # type: ignore[attr-defined]

    def unit_gradients(self, batch: StepBatch) -> list[list[Tensor]]:
        """Return the gradients of units of one draw."""
        return [list(entry) for entry in zip(*self.entry_gradients(batch), strict=True)] if batch.size else []


def one_pass(base: Base, jobs: list[TrainJob], batches: list[StepBatch]) -> list[Tensor]:
    """Compute the gradients of every entry of each client [n, D] in one pass with interleaved clients."""
    rows, queue = CohortBuffers(base, BufferSpec.of(jobs), len(jobs)), EntryQueue()
    rows.load(dict(enumerate(jobs)))
    for row, batch in enumerate(batches):
        queue.push(row, batch._replace(examples=batch.examples + rows.first_example(row)))
    microbatch = queue.pop(len(queue))
    result, losses = gradients(base, rows, on_device(microbatch, base.device))
    assert result.shape == (microbatch.size, rows.layout.size)
    assert losses.shape == (microbatch.size,)
    parts = result.split([batch.size for batch in batches])
    kept = [rows.layout.mask(plan.start) for plan in jobs]
    for part, mask in zip(parts, kept, strict=True):
        assert (part[:, ~mask] == 0).all()  # padding
    return [part[:, mask] for part, mask in zip(parts, kept, strict=True)]


def max_relative_error(found: Tensor, wanted: Tensor) -> float:
    """Compute the maximum relative error over all examples."""
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def loop_gradients(reference: Reference, batch: StepBatch) -> Tensor:
    """Compute weighted gradients [n, D], one example at a time."""
    rows = []
    for index, weight in enumerate(batch.weights.tolist()):
        (loss,) = reference.losses(batch.part(slice(index, index + 1)))
        result = torch.autograd.grad(weight * loss, reference.parameters)
        rows.append(torch.cat([part.flatten() for part in result]))
    return torch.stack(rows)


@pytest.mark.integration
@quiet
@pytest.mark.parametrize("sites", [ATTENTION, EVERY_KIND], ids=["attention", "every kind"])
def test_gradients_match_opacus_and_a_loop(pipeline_folder: Path, sites: str) -> None:
    base = Base(pipeline_folder, sites=sites)
    frozen = nonzero_adapter(base, 2, 9)
    jobs = [job(base, "a"), job(base, "b", rank=3, batch_size=4), job(base, "frozen underneath", frozen=frozen)]
    batches = [BatchSampler(plan).next() for plan in jobs]
    result = one_pass(base, jobs, batches)
    for plan, batch, ours in zip(jobs, batches, result, strict=True):
        assert max_relative_error(ours, loop_gradients(Reference(base, plan), batch)) < 2e-5
    for plan, batch, ours in list(zip(jobs, batches, result, strict=True))[:2]:
        theirs = torch.cat([part.flatten(1) for part in _OpacusReference(base, plan).entry_gradients(batch)], dim=1)
        assert max_relative_error(ours * batch.size, theirs) < 2e-5


def test_weights_scale_gradients(base: Base) -> None:
    prior = Prior(examples=examples(base, 2, 5), weight=0.3)
    for plan in (private(base, "a", draws=3, prior=prior, count=2, rate=1.0), job(base, "b", prior=prior)):
        batch = BatchSampler(plan).next()
        (result,) = one_pass(base, [plan], [batch])
        assert max_relative_error(result, loop_gradients(Reference(base, plan), batch)) < 2e-5


@pytest.mark.integration
@quiet
def test_ten_steps_match_opacus(base: Base) -> None:
    """Poisson batches, clipping, noise and AdamW of Opacus, with our random numbers."""

    def plan() -> TrainJob:
        return private(base, "a", draws=1, steps=10, clip=0.03, batch_size=3)

    peer = _OpacusReference(base, plan())
    expected = peer.train()
    assert 0.1 < peer.share_clipped < 0.9
    jobs = [job(base, "b", rank=3), plan(), private(base, "c")]
    assert_close(train(base, jobs, memory=memory_for(base, jobs, 5), timesteps=2)[1], expected, plan().start)


@pytest.mark.integration
@pytest.mark.parametrize("entries", [3, 40])
def test_all_kinds_of_layers_train_privately(pipeline_folder: Path, entries: int) -> None:
    """Attention, feed-forward, time embedding and convolutions with stride 1 and 2, and kernel size 3 and 1."""
    base = Base(pipeline_folder, sites=EVERY_KIND, compute="fp64")
    kinds = {(site.kernel, "time" in name, "ff" in name) for name, site in base.sites.items()}
    assert {((3, 3), False, False), ((1, 1), False, False), ((), True, False), ((), False, True)} <= kinds

    def jobs() -> list[TrainJob]:
        frozen = nonzero_adapter(base, 1, 9)
        clips = {"clip": 0.3, "steps": 2, "count": 3}
        return [
            private(base, "flat", rank=3, **clips),
            private(base, "some sites", start=at_some_sites(nonzero_adapter(base, 2, 4), 3), frozen=frozen, **clips),
            job(base, "plain", steps=2),
        ]

    references = [Reference(base, plan) for plan in jobs()]
    result = train(base, jobs(), memory=memory_for(base, jobs(), entries), timesteps=2)
    for got, reference in zip(result, references, strict=True):
        assert_close(got, reference.train(), reference.job.start, 1e-10)
    assert any(reference.scales and reference.share_clipped for reference in references)
    assert any(reference.scales and reference.share_clipped < 1 for reference in references)


@pytest.mark.integration
def test_checkpointing_keeps_the_result(pipeline_folder: Path) -> None:
    """Blocks do run twice."""

    def jobs(base: Base) -> list[TrainJob]:
        prior = Prior(examples=examples(base, 2, 5))
        return [private(base, "a", steps=2, prior=prior), job(base, "b", steps=2, frozen=nonzero_adapter(base, 2, 9))]

    result, calls = [], []  # calls of a layer in each pass; with checkpointing there may be fewer passes
    for checkpointing in (False, True):
        base = Base(pipeline_folder, sites=ATTENTION, compute="fp64")
        count: Counter[str] = Counter()
        watched = base.network.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
        watched.register_forward_hook(lambda *_, count=count: count.update(["layer"]))
        base.network.register_forward_hook(lambda *_, count=count: count.update(["pass"]))
        if checkpointing:
            base.network.enable_gradient_checkpointing()  # type: ignore[operator]
        result.append(train(base, jobs(base), memory=PLENTY, timesteps=2))
        calls.append(count["layer"] / count["pass"])
    assert calls == [1, 2]
    for plan, before, after in zip(jobs(base), *result, strict=True):
        assert_close(after, trained_adapter(before), plan.start, 1e-10)
        assert_close(after, Reference(base, plan).train(), plan.start, 1e-10)


@pytest.mark.integration
def test_half_precision_network_trains_float32_adapters(base: Base, pipeline_folder: Path) -> None:
    """The network runs in bf16; adapters stay in float32 and agree with float32 training."""
    half = Base(pipeline_folder, sites=ATTENTION, compute="bf16")
    jobs = [job(base, "a", steps=3, learning_rate=1e-3), job(base, "b", rank=3, steps=3, learning_rate=1e-3)]
    result, expected = (train(each, jobs, memory=PLENTY, timesteps=2) for each in (half, base))
    for plan, low, full in zip(jobs, result, expected, strict=True):
        moves = []
        for adapter in (trained_adapter(low), trained_adapter(full)):
            factors = [factor for name in plan.start for factor in adapter[name]]
            assert all(factor.dtype == torch.float32 and factor.isfinite().all() for factor in factors)
            starts = [factor for factors in plan.start.values() for factor in factors]
            moves.append(torch.cat([(f - start).flatten() for f, start in zip(factors, starts, strict=True)]))
        assert float(torch.cosine_similarity(*moves, dim=0)) > 0.98
    (private_one,) = train(half, [private(half, "c", draws=3)], memory=PLENTY, timesteps=2)
    for factor in (factor for factors in trained_adapter(private_one).values() for factor in factors):
        assert factor.dtype == torch.float32
        assert factor.isfinite().all()
