"""Compare the network with adapters to the same UNet with the adapters merged into its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_pre_hook

from bench.lib.tiny import ATTENTION
from models.diffusion.denoiser import Denoiser
from models.diffusion.objective import add_noise, diffusion, per_example_loss, target
from models.diffusion.sites import find_sites
from models.lora.batched_lora import BatchedFactors, SlotLayer, slot_layers, stack_adapters, to_device
from models.quantization.blockwise import dequantize, quantize
from models.quantization.modes import quant_types
from tests.helpers.adapters import random_adapter

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

FEED_FORWARD = r".*ff\.net\.(0\.proj|2)"
TIME = r"time_embedding\.linear_[12]|.*time_emb_proj"
CONVOLUTIONS = r".*\.conv[12]|.*conv_shortcut|.*samplers\.0\.conv|conv_in|conv_out|.*proj_(in|out)"
EVERYTHING = ".*"

SCHEDULE = diffusion(torch.linspace(0.999, 0.01, 1000), "v_prediction")


@pytest.fixture(scope="module")
def unet(pipeline_folder: Path) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(pipeline_folder / "unet").eval()


@pytest.fixture
def forward_calls() -> Iterator[list[nn.Module]]:
    """Record every forward call of a module."""
    seen: list[nn.Module] = []
    handle = register_module_forward_pre_hook(lambda module, _: seen.append(module))
    yield seen
    handle.remove()


def networks(forward_calls: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the distinct UNets that ran."""
    from diffusers import UNet2DConditionModel

    return list({id(module): module for module in forward_calls if isinstance(module, UNet2DConditionModel)}.values())


def denoiser(unet: nn.Module, sites: str = EVERYTHING, **options: Any) -> Denoiser:
    """Copy the network, which a denoiser changes in place."""
    return Denoiser(copy.deepcopy(unet), SCHEDULE, sites=sites, **({"compute": "fp64"} | options))


def inputs(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, context = torch.randn(count, 4, 8, 8, generator=generator), torch.randn(count, 8, 16, generator=generator)
    return x.to(dtype), torch.arange(count) * 999 // count, context.to(dtype)


def merged_unet(unet: nn.Module, adapters: Sequence[Mapping[str, BatchedFactors]], slot: int) -> Callable[..., Tensor]:
    """Return the plain UNet in fp64 with W + Σ B A of one slot at every site, differentiable in the factors."""
    exact = copy.deepcopy(unet).double()
    weights = {f"{name}.weight": layer.weight for name, layer in exact.named_modules() if hasattr(layer, "weight")}
    for stacks in adapters:
        for name, stack in stacks.items():
            own = slot % len(stack.a)
            product = (stack.b[own] @ stack.a[own]).view_as(weights[f"{name}.weight"])
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + product
    return lambda x, t, context: functional_call(exact, weights, (x, t, context)).sample


def expected_outputs(unet: nn.Module, adapters: Sequence[Mapping[str, BatchedFactors]], slots: int) -> Tensor:
    x, t, context = inputs(4)
    parts = zip(x.chunk(slots), t.chunk(slots), context.chunk(slots), strict=True)
    return torch.cat([merged_unet(unet, adapters, slot)(*part) for slot, part in enumerate(parts)])


def loss_gradients(output: Tensor, stacks: Mapping[str, BatchedFactors]) -> list[Tensor]:
    """Each element has a different weight, so that errors can't cancel."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return list(
        torch.autograd.grad((output * weights).sum(), [factor for stack in stacks.values() for factor in stack])
    )


def require_grad(stacks: Mapping[str, BatchedFactors]) -> dict[str, BatchedFactors]:
    return {
        name: BatchedFactors(*(factor.detach().requires_grad_() for factor in stack)) for name, stack in stacks.items()
    }


def two_slots(model: Denoiser, ranks: tuple[int, int] = (2, 1)) -> dict[str, BatchedFactors]:
    adapters = [random_adapter(model.sites, rank, seed, model.dtype) for seed, rank in enumerate(ranks)]
    return dict(stack_adapters(model.sites, adapters))


def assert_exact(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for own_grads, other_grads in zip(actual, expected, strict=True):
        assert (own_grads - other_grads).abs().max() <= 1e-10 * max(1.0, float(other_grads.detach().abs().max()))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("sites", "checkpointing"),
    [(ATTENTION, False), (FEED_FORWARD, True), (TIME, True), (CONVOLUTIONS, False), (EVERYTHING, True)],
    ids=["attention", "feed-forward", "time", "convolutions", "everything"],
)
def test_equals_unet_with_merged_weights(unet: nn.Module, sites: str, checkpointing: bool) -> None:
    model = denoiser(unet, sites)
    if checkpointing:
        model.network.enable_gradient_checkpointing()
    common = stack_adapters(model.sites, [random_adapter(model.sites, 3, 7, torch.float64)])
    own = require_grad(two_slots(model))
    with model.use_adapters([common, own]) as denoise:
        actual = denoise(*inputs(4))
        gradients = loss_gradients(actual, own)
    expected = expected_outputs(unet, [common, own], 2)
    assert_exact([actual], [expected])
    assert_exact(gradients, loss_gradients(expected, own))
    assert (expected_outputs(unet, [common], 2) - expected).abs().max() > 1e-3


def test_every_site_affects_the_output(unet: nn.Module) -> None:
    """A layer with two names, or whose weight is read without calling it, would ignore its adapter."""
    model = denoiser(unet)
    own = require_grad(two_slots(model))
    with model.use_adapters([own]) as denoise:
        gradients = loss_gradients(denoise(*inputs(2)), own)
    assert all(gradient[slot].abs().max() > 0 for gradient in gradients for slot in (0, 1))


def test_without_adapters_equals_unet(unet: nn.Module) -> None:
    model = denoiser(unet, compute="fp32")
    x, t, context = inputs(3, torch.float32)
    for nothing in ([], [{}], [two_slots(model, (0, 0))]):
        with model.use_adapters(nothing) as denoise, torch.no_grad():
            torch.testing.assert_close(denoise(x, t, context), unet(x, t, context).sample)


def test_copies_recompute_checkpointed_blocks(unet: nn.Module, forward_calls: list[nn.Module]) -> None:
    model = denoiser(unet, ATTENTION)
    model.network.enable_gradient_checkpointing()
    own = require_grad(two_slots(model))

    def passes() -> int:
        return sum(isinstance(module, SlotLayer) for module in forward_calls)

    with model.use_adapters([own]), model.use_adapters([own]) as denoise:  # the second copy
        output = denoise(*inputs(2))
        assert passes() == len(model.sites)
        loss_gradients(output, own)
        assert passes() == 2 * len(model.sites)


@pytest.mark.integration
def test_bf16_error_is_rounding_only(unet: nn.Module) -> None:
    model = denoiser(unet, compute="bf16")
    assert model.full_precision == torch.float32
    x, t, context = inputs(4, model.full_precision)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    own = to_device(two_slots(denoiser(unet, compute="fp32")), model.like)
    with model.use_adapters([own]) as denoise, torch.no_grad():
        output = denoise(add_noise(SCHEDULE, x, noise, t), t, context)
    assert output.dtype == torch.bfloat16
    expected = target(SCHEDULE, x, noise, t)
    losses = per_example_loss(output, expected)
    assert losses.dtype == torch.float32
    exact = to_device(own, torch.empty(0, dtype=torch.float64))
    parts = zip(add_noise(SCHEDULE, x, noise, t).double().chunk(2), t.chunk(2), context.double().chunk(2), strict=True)
    truth = torch.cat([merged_unet(unet, [exact], slot)(*part) for slot, part in enumerate(parts)])
    error = (output.double() - truth).norm() / truth.norm()
    assert 1e-4 < error < 8 * 2**-8  # half a unit in the last place is 2⁻⁹, and about fifty layers are stacked
    torch.testing.assert_close(losses.double(), (truth - expected).square().flatten(1).mean(1), rtol=16 * 2**-8, atol=0)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("weights", "compute", "error"), [("int8", "fp32", 1e-4), ("mixed", "fp64", 1e-10), ("nf4", "fp32", 1e-4)]
)
def test_quantized_equals_unet_with_rounded_weights(unet: nn.Module, weights: str, compute: str, error: float) -> None:
    model, rounded = denoiser(unet, weights=weights, compute=compute), copy.deepcopy(unet).double()
    with torch.no_grad():
        for name, kind in quant_types(unet, weights).items():
            weight = rounded.get_parameter(f"{name}.weight")
            weight.copy_(dequantize(quantize(weight, kind), weight.shape, torch.float64))
    assert list(model.sites) == list(find_sites(unet, EVERYTHING))
    own = require_grad(two_slots(model))
    with model.use_adapters([own]) as denoise:
        actual = denoise(*inputs(4, model.full_precision))
        gradients = loss_gradients(actual, own)
    exact = require_grad(to_device(own, torch.empty(0, dtype=torch.float64)))
    expected = expected_outputs(rounded, [exact], 2)
    assert (actual - expected).norm() <= error * expected.norm()
    for own_grads, other_grads in zip(gradients, loss_gradients(expected, exact), strict=True):
        assert (own_grads - other_grads).norm() <= 10 * error * other_grads.norm()
    assert (expected_outputs(unet, [exact], 2) - expected).norm() > 1e-4 * expected.norm()


@pytest.mark.integration
@pytest.mark.parametrize("weights", ["fp32", "mixed"])
def test_checkpointing_only_changes_saved_tensors(unet: nn.Module, weights: str) -> None:
    actual, saved = [], []
    for checkpointing in ("none", "block"):
        model = denoiser(unet, weights=weights, checkpointing=checkpointing)
        own, bytes_kept = require_grad(two_slots(model)), []

        def keep(tensor: Tensor, seen: list[int] = bytes_kept) -> Tensor:
            seen.append(tensor.nbytes)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            model.use_adapters([own]) as denoise,
        ):
            output = denoise(*inputs(4))
            saved.append(sum(bytes_kept))
            actual.append([output, *loss_gradients(output, own)])
    for own_grads, other_grads in zip(*actual, strict=True):
        assert torch.equal(own_grads, other_grads)
    assert saved[1] < 0.5 * saved[0]


def tensors(network: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in [*network.named_parameters(), *network.named_buffers()]}


@pytest.mark.integration
@pytest.mark.parametrize("weights", ["fp32", "mixed"])
def test_threads_share_weights_but_not_adapters(unet: nn.Module, forward_calls: list[nn.Module], weights: str) -> None:
    model, together = denoiser(unet, weights=weights), Barrier(3, timeout=60)
    adapters = [stack_adapters(model.sites, [random_adapter(model.sites, 2, s, torch.float64)]) for s in range(3)]

    @torch.no_grad()
    def single(stacks: Mapping[str, BatchedFactors]) -> Tensor:
        with model.use_adapters([stacks]) as denoise:
            return denoise(*inputs(2))

    @torch.no_grad()
    def concurrent_grads(stacks: Mapping[str, BatchedFactors]) -> list[Tensor]:
        with model.use_adapters([stacks]) as denoise:
            together.wait()
            return [denoise(*inputs(2)) for _ in range(3)]

    expected = [single(stacks) for stacks in adapters]
    assert len(networks(forward_calls)) == 1
    with ThreadPoolExecutor(3) as threads:
        for actual, want in zip(threads.map(concurrent_grads, adapters), expected, strict=True):
            assert all(torch.equal(each, want) for each in actual)
    assert len(networks(forward_calls)) == 3
    single(adapters[0])
    assert len(networks(forward_calls)) == 3  # an idle copy is reused
    first, *others = networks(forward_calls)
    assert all(tensors(other) == tensors(first) == tensors(model.network) for other in others)
    assert not any(
        layer.active_adapters
        for network in [model.network, *networks(forward_calls)]
        for layer in slot_layers(network).values()
    )


def test_nested_contexts_use_separate_networks(unet: nn.Module) -> None:
    model = denoiser(unet, ATTENTION)
    one, two = (stack_adapters(model.sites, [random_adapter(model.sites, 2, s, torch.float64)]) for s in (0, 1))
    with model.use_adapters([one]) as outer, torch.no_grad():
        before = outer(*inputs(2))
        with model.use_adapters([two]) as inner:
            within, again = inner(*inputs(2)), outer(*inputs(2))
        assert torch.equal(before, again)
        assert torch.equal(before, outer(*inputs(2)))
    assert not torch.allclose(before, within)


def test_failure_clears_adapters(unet: nn.Module, forward_calls: list[nn.Module]) -> None:
    model = denoiser(unet, ATTENTION)
    own = two_slots(model)
    with pytest.raises(RuntimeError), model.use_adapters([own]) as denoise:
        denoise(*inputs(3))  # three examples don't fill two slots
    assert not any(layer.active_adapters for layer in slot_layers(networks(forward_calls)[0]).values())
    with model.use_adapters([]) as denoise, torch.no_grad():
        actual = denoise(*inputs(3))
    assert len(networks(forward_calls)) == 1
    torch.testing.assert_close(actual, merged_unet(unet, [], 0)(*inputs(3)))


def test_network_is_frozen(unet: nn.Module) -> None:
    model = denoiser(unet)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not any(module.training for module in model.network.modules())
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float64} == {model.like.dtype}


class Small(nn.Module):
    """Network that is called like a UNet and compiles in a second or two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 3, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: Tensor, t: Tensor, *, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        return (self.conv(x) + torch.einsum("nlc,n->nc", self.linear(encoder_hidden_states), t.to(x))[..., None, None],)


@pytest.mark.integration
def test_compiles_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = CompileCounterWithBackend("aot_eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, *, dynamic, **_: real(run, dynamic=dynamic, backend=compiler))
    torch.compiler.reset()
    model = denoiser(Small())

    def check(seed: int, count: int) -> None:
        adapters = [random_adapter(model.sites, 2, seed + i, torch.float64) for i in (0, 1)]
        own = require_grad(stack_adapters(model.sites, adapters))
        with model.use_adapters([own]) as denoise:
            expected = denoise(*inputs(count))
        with model.use_adapters([own], compiled=True) as denoise:
            actual = denoise(*inputs(count))
            assert_exact([actual, *loss_gradients(actual, own)], [expected, *loss_gradients(expected, own)])

    check(seed=0, count=4)
    check(seed=2, count=4)  # other adapters
    with model.use_adapters([]):
        check(seed=4, count=4)  # another copy
    assert compiler.frame_count == 1
    check(seed=6, count=6)
    assert compiler.frame_count == 2
