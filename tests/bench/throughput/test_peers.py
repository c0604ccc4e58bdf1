"""Tests that peers do the timed work: equal gradients, clipping and noise, and counted operations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
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
    """Make a peer with nonzero B, so that every factor has a gradient."""
    torch.manual_seed(1)
    peer = HooksPeer(build(TINY, CPU), examples(TINY, 0, CPU), schedule(CPU), graphs=False)
    with torch.no_grad():
        peer.flat.copy_(0.1 * torch.randn_like(peer.flat))
    return peer


def opacus(like: HooksPeer) -> OpacusPeer:
    """Make an Opacus peer with the same factors."""
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
    """Compute gradients `[n, D]` by autograd, one example at a time."""
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


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def test_hooks_match_opacus_and_a_loop() -> None:
    hooks_peer, examples_seen = hooks(), batch(5)
    opacus_peer = opacus(hooks_peer)
    opacus_peer.backward(examples_seen)
    expected = torch.cat([parameter.grad_sample.flatten(1) for parameter in opacus_peer.parameters], dim=1)
    gradients_of_hooks = hooks_peer.gradients(examples_seen)
    assert relative(gradients_of_hooks, expected) < 2e-5
    assert relative(gradients_of_hooks, one_by_one(hooks_peer, examples_seen)) < 2e-5


def fixed(examples: Examples, schedule: Schedule, pictures: Tensor) -> PeerBatch:
    """Draw a batch that depends only on the pictures."""
    t = (pictures * 137) % len(schedule)
    x0, noise = examples.latents[pictures], examples.latents[pictures].flip(-1)
    return PeerBatch(add_noise(schedule, x0, noise, t), t, examples.context[pictures], noise)


@pytest.mark.parametrize("size", [1, 4, LARGEST + 3])
def test_hooks_step_matches_opacus(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping, sum and scale give AdamW the same gradient; the largest batch takes two passes."""
    hooks_peer = hooks()
    norms = hooks_peer.gradients(fixed(hooks_peer.examples, hooks_peer.schedule, torch.arange(size))).norm(dim=1)
    noiseless = dataclasses.replace(PRIVACY, clip=float(norms.median()), noise_multiplier=0.0)
    for module in ("bench.throughput.peers", "bench.throughput.opacus_baseline"):
        monkeypatch.setattr(f"{module}.PRIVACY", noiseless)
        monkeypatch.setattr(f"{module}.draw", fixed)
    opacus_peer = opacus(hooks_peer)
    for _ in range(2):  # the second step must not see state of the first
        hooks_peer.step(torch.arange(size))
        opacus_peer.step(torch.arange(size))
    for moment in ("exp_avg", "exp_avg_sq"):
        expected = torch.cat(
            [opacus_peer.optimizer.state[parameter][moment].flatten() for parameter in opacus_peer.parameters]
        )
        assert relative(hooks_peer.optimizer.state[hooks_peer.flat][moment], expected) < 1e-4
    after = torch.cat([parameter.detach().flatten() for parameter in opacus_peer.parameters])
    assert torch.equal(hooks_peer.compute_flat, hooks_peer.flat)
    assert relative(hooks_peer.flat.detach(), after) < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_match_eager_steps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_empty_batch_is_noised() -> None:
    hooks_peer = hooks()
    opacus_peer = opacus(hooks_peer)
    for peer in (hooks_peer, opacus_peer):
        peer.step(torch.arange(0))
    expected = PRIVACY.noise_multiplier * PRIVACY.clip / BATCH
    first = torch.cat(
        [opacus_peer.optimizer.state[parameter]["exp_avg"].flatten() for parameter in opacus_peer.parameters]
    )
    assert float(hooks_peer.gradient.std()) == pytest.approx(expected, rel=0.05)
    assert float(first.std()) == pytest.approx(0.1 * expected, rel=0.05)


@pytest.mark.parametrize("factors", ["autocast", "fp32", "compute"])
def test_every_factor_precision_trains(factors: FactorPrecision) -> None:
    data, steps = examples(TINY, 0, CPU), schedule(CPU)
    for kind in (PeftPeer, OpacusPeer):
        peer = kind(build(TINY, CPU, torch.bfloat16), data, steps, factors=factors)
        initial = [parameter.detach().clone() for parameter in peer.parameters]
        peer.step(torch.arange(BATCH))
        assert {parameter.dtype for parameter in peer.parameters} == {
            torch.bfloat16 if factors == "compute" else torch.float32
        }
        assert len(peer.parameters) == 2 * sites(peer.unet)
        assert any(not torch.equal(a, b) for a, b in zip(initial, peer.parameters, strict=True))


def test_poisson_sizes_are_decile_medians() -> None:
    middles = [(i + 0.5) / len(POISSON_SIZES) for i in range(len(POISSON_SIZES))]
    assert sorted(POISSON_SIZES) == [int(n) for n in binom.ppf(middles, EXAMPLES, PRIVACY.sampling_rate)]
    assert sum(POISSON_SIZES) == BATCH * len(POISSON_SIZES)


def test_operation_count_matches_a_manual_count() -> None:
    """Self-attention of T tokens and width d, with factors at all four projections; x needs no gradient."""
    from diffusers.models.attention_processor import Attention

    tokens, d, r = 24, 32, RANK
    block = Attention(d, heads=4, dim_head=d // 4, bias=False).requires_grad_(False).to("meta")
    for name in ("to_q", "to_k", "to_v"):
        setattr(block, name, LoraLinear(getattr(block, name)).to("meta"))
    block.to_out[0] = LoraLinear(block.to_out[0]).to("meta")
    projection, factor, attention = 2 * tokens * d * d, 2 * tokens * d * r, 2 * tokens * tokens * d
    forward = 4 * (projection + 2 * factor) + 2 * attention  # scores, and their product with values
    backward = (
        3 * (factor + factor + factor)  # q, k, v: ∂B, the gradient to A, ∂A; none to x
        + (projection + 4 * factor)  # out: through the base and through B and A; ∂B and ∂A
        + 4 * attention  # values, weights, queries, keys
    )
    x = torch.empty(1, tokens, d, device="meta")
    assert count_operations(lambda: block(x).sum().backward()) == forward + backward


@pytest.mark.integration
def test_matrix_rate_is_plausible() -> None:
    assert 1e8 < matrix_rate(CPU, torch.float32, repeats=1) < 1e14


def sites(unet: nn.Module) -> int:
    return sum(name.endswith("lora_A") for name, _ in unet.named_modules())
