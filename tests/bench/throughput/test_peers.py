"""The peers do the work that they are timed for: the same gradients, clipped and noised, and the operations counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers.models.attention_processor import Attention
from scipy.stats import binom
from torch import Tensor, nn

from bench.lib.workloads import BATCH, EXAMPLES, POISSON_SIZES, PRIVACY, RANK, WORKLOADS, build, examples, schedule
from bench.throughput.opacus_baseline import LARGEST, HooksPeer, LoraLinear
from bench.throughput.peers import FactorPrecision, OpacusPeer, PeerBatch, PeftPeer, draw, losses
from bench.throughput.roofline import count_operations, matrix_rate
from models.diffusion.objective import Schedule, add_noise
from training.jobs import Examples

CPU = torch.device("cpu")
TINY = WORKLOADS["tiny"]


def hooks() -> HooksPeer:
    """A peer whose B is not zero, so that every factor has a gradient."""
    torch.manual_seed(1)
    peer = HooksPeer(build(TINY, CPU), examples(TINY, 0, CPU), schedule(CPU), graphs=False)
    with torch.no_grad():
        peer.flat.copy_(0.1 * torch.randn_like(peer.flat))
    return peer


def opacus(like: HooksPeer) -> OpacusPeer:
    """Opacus with the same factors."""
    peer = OpacusPeer(build(TINY, CPU), examples(TINY, 0, CPU), schedule(CPU), factors="fp32")
    layers = [
        layer for module in like.unet.modules() if isinstance(module, LoraLinear) for layer in (module.a, module.b)
    ]
    with torch.no_grad():
        for parameter, layer in zip(peer.parameters, layers, strict=True):
            parameter.copy_(layer.weight)
    return peer


def batch(size: int) -> PeerBatch:
    torch.manual_seed(2)
    return draw(examples(TINY, 0, CPU), schedule(CPU), torch.randperm(EXAMPLES)[:size])


def one_by_one(peer: HooksPeer, batch: PeerBatch) -> Tensor:
    """Gradients [n, D] by autograd, one example at a time."""
    layers = [
        layer for module in peer.unet.modules() if isinstance(module, LoraLinear) for layer in (module.a, module.b)
    ]
    weights = [layer.weight.requires_grad_() for layer in layers]
    peer.per_example.rows = peer.compute_flat.new_empty(1, len(peer.flat))
    rows = []
    for i in range(len(batch.t)):
        loss = losses(peer.unet, PeerBatch(*(part[i : i + 1] for part in batch))).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_our_hooks_find_the_gradients_that_opacus_and_a_loop_find() -> None:
    ours, seen = hooks(), batch(5)
    theirs = opacus(ours)
    theirs.backward(seen)
    wanted = torch.cat([parameter.grad_sample.flatten(1) for parameter in theirs.parameters], dim=1)
    found = ours.gradients(seen)
    assert relative(found, wanted) < 2e-5
    assert relative(found, one_by_one(ours, seen)) < 2e-5


def fixed(examples: Examples, schedule: Schedule, pictures: Tensor) -> PeerBatch:
    """A draw that depends on the pictures alone."""
    t = (pictures * 137) % len(schedule)
    x0, noise = examples.latents[pictures], examples.latents[pictures].flip(-1)
    return PeerBatch(add_noise(schedule, x0, noise, t), t, examples.context[pictures], noise)


@pytest.mark.parametrize("size", [1, 4, LARGEST + 3])
def test_a_step_of_ours_is_a_step_of_opacus(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip, sum and scale reach AdamW alike; the largest batch takes two passes."""
    ours = hooks()
    norms = ours.gradients(fixed(ours.examples, ours.schedule, torch.arange(size))).norm(dim=1)
    quiet = dataclasses.replace(PRIVACY, clip=float(norms.median()), noise_multiplier=0.0)
    for module in ("bench.throughput.peers", "bench.throughput.opacus_baseline"):
        monkeypatch.setattr(f"{module}.PRIVACY", quiet)
        monkeypatch.setattr(f"{module}.draw", fixed)
    theirs = opacus(ours)
    for _ in range(2):  # nothing may be left of the first in the second
        ours.step(torch.arange(size))
        theirs.step(torch.arange(size))
    for moment in ("exp_avg", "exp_avg_sq"):
        wanted = torch.cat([theirs.optimizer.state[parameter][moment].flatten() for parameter in theirs.parameters])
        assert relative(ours.optimizer.state[ours.flat][moment], wanted) < 1e-4
    after = torch.cat([parameter.detach().flatten() for parameter in theirs.parameters])
    assert torch.equal(ours.compute_flat, ours.flat)
    assert relative(ours.flat.detach(), after) < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_are_eager_steps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.throughput.opacus_baseline.PRIVACY", dataclasses.replace(PRIVACY, noise_multiplier=0.0))
    monkeypatch.setattr("bench.throughput.opacus_baseline.draw", fixed)
    gpu = torch.device("cuda")
    moments = []
    for graphs in (True, False):
        torch.manual_seed(1)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            peer = HooksPeer(build(TINY, gpu, dtype), examples(TINY, 0, gpu), schedule(gpu), graphs=graphs)
            for size in (4, 0, LARGEST + 3, 1):
                peer.step(torch.arange(size))
        moments.append(peer.optimizer.state[peer.flat]["exp_avg"])
    assert relative(*moments) < (1e-4 if dtype == torch.float32 else 3e-2)


def test_an_empty_batch_is_noised_alike() -> None:
    ours = hooks()
    theirs = opacus(ours)
    for peer in (ours, theirs):
        peer.step(torch.arange(0))
    wanted = PRIVACY.noise_multiplier * PRIVACY.clip / BATCH
    first = torch.cat([theirs.optimizer.state[parameter]["exp_avg"].flatten() for parameter in theirs.parameters])
    assert float(ours.gradient.std()) == pytest.approx(wanted, rel=0.05)
    assert float(first.std()) == pytest.approx(0.1 * wanted, rel=0.05)


@pytest.mark.parametrize("factors", ["autocast", "fp32", "compute"])
def test_every_way_to_keep_factors_trains_them(factors: FactorPrecision) -> None:
    data, steps = examples(TINY, 0, CPU), schedule(CPU)
    for kind in (PeftPeer, OpacusPeer):
        peer = kind(build(TINY, CPU, torch.bfloat16), data, steps, factors=factors)
        before = [parameter.detach().clone() for parameter in peer.parameters]
        peer.step(torch.arange(BATCH))
        assert {parameter.dtype for parameter in peer.parameters} == {
            torch.bfloat16 if factors == "compute" else torch.float32
        }
        assert len(peer.parameters) == 2 * sites(peer.unet)
        assert any(not torch.equal(a, b) for a, b in zip(before, peer.parameters, strict=True))


def test_poisson_sizes_stand_for_many_batches() -> None:
    middles = [(i + 0.5) / len(POISSON_SIZES) for i in range(len(POISSON_SIZES))]
    assert sorted(POISSON_SIZES) == [int(n) for n in binom.ppf(middles, EXAMPLES, PRIVACY.sampling_rate)]
    assert sum(POISSON_SIZES) == BATCH * len(POISSON_SIZES)


def test_operations_are_those_that_one_counts_by_hand() -> None:
    """Self-attention of T tokens, width d, with factors at all four projections; x itself needs no gradient."""
    tokens, d, r = 24, 32, RANK
    block = Attention(d, heads=4, dim_head=d // 4, bias=False).requires_grad_(False).to("meta")
    for name in ("to_q", "to_k", "to_v"):
        setattr(block, name, LoraLinear(getattr(block, name)).to("meta"))
    block.to_out[0] = LoraLinear(block.to_out[0]).to("meta")
    projection, factor, attention = 2 * tokens * d * d, 2 * tokens * d * r, 2 * tokens * tokens * d
    forward = 4 * (projection + 2 * factor) + 2 * attention  # scores, and values by them
    backward = (
        3 * (factor + factor + factor)  # q, k, v: ∂B, what reaches A, ∂A; nothing flows on to x
        + (projection + 4 * factor)  # out: through the base and through B and A; ∂B and ∂A
        + 4 * attention  # values, weights, queries, keys
    )
    x = torch.empty(1, tokens, d, device="meta")
    assert count_operations(lambda: block(x).sum().backward()) == forward + backward


def test_the_matrix_rate_is_plausible() -> None:
    assert 1e8 < matrix_rate(CPU, torch.float32, repeats=1) < 1e14


def sites(unet: nn.Module) -> int:
    return sum(name.endswith("lora_A") for name, _ in unet.named_modules())
