"""A dry run predicts a real run's memory to the byte for all networks, weights and checkpointing modes."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.errors import AntherError
from models.families.known import KNOWN_BASES
from models.footprint.dry_run import EXPONENTIAL_BACKWARD, EXPONENTIAL_FORWARD, DryRun, fake_parameters, to_fake
from models.footprint.footprint import Footprint, example_shapes, footprint, forward_backward, meta_denoiser
from models.footprint.tensor_memory import LiveStorages, storages
from models.lora.batched_lora import Layout
from models.quantization import blockwise
from models.quantization.blockwise import fresh_scratch
from tests.helpers.networks import SMALL, real
from tests.helpers.samples import sampled

RANK = 3
EVERYWHERE = r".*(attn|conv|ff|resnets).*"


def predicted(kind: str, *, batch: int = 1, rank: int = RANK, **how: str) -> Footprint:
    base = SMALL[kind]
    return footprint(
        meta_denoiser(base, **({"sites": base.family.sites} | how)), *example_shapes(base, 128), rank=rank, batch=batch
    )


def real_peak(kind: str, batch: int, **how: str) -> int:
    """Measure the peak tensor memory of a real pass, without the base."""
    base = real(SMALL[kind], **how)
    layout = Layout(base.sites, RANK)
    with fresh_scratch(), LiveStorages() as actual:
        entries = [torch.zeros(batch, *shape) for shape in example_shapes(SMALL[kind], 128)]
        forward_backward(base, *entries, layout, torch.zeros(batch, layout.size))
    return actual.peak


def dry_peak(kind: str, batch: int, **how: str) -> int:
    """Measure the same in a dry run, without its workspace."""
    base = meta_denoiser(SMALL[kind], **({"sites": SMALL[kind].family.sites} | how))
    mode, layout = FakeTensorMode(allow_non_fake_inputs=True), Layout(base.sites, RANK)
    frozen = fake_parameters(base.network, mode)
    with mode, fresh_scratch(), DryRun(frozen, {}) as run:
        entries = [torch.zeros(batch, *shape) for shape in example_shapes(SMALL[kind], 128)]
        forward_backward(base, *entries, layout, torch.zeros(batch, layout.size))
    return run.peak


@pytest.mark.integration
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    sampled(
        [(kind, checkpointing) for kind in SMALL if kind != "sdxl" for checkpointing in ("none", "block")],
        [("unet", "none"), ("unet", "block"), ("sd3", "block"), ("flux", "none")],
    ),
)
def test_dry_run_memory_equals_real_run(kind: str, checkpointing: str) -> None:
    batch = 2 if kind == "unet" else 1
    expected = real_peak(kind, batch, checkpointing=checkpointing)
    assert dry_peak(kind, batch, checkpointing=checkpointing) == pytest.approx(expected, rel=0.001)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("kind", "weights", "checkpointing"),
    sampled(
        [("unet", "mixed", "block"), ("sd3", "int8", "block"), ("pixart", "nf4", "none")],
        [("pixart", "nf4", "none")],
    ),
)
def test_quantized_dry_run_memory_equals_real_run(
    kind: str, weights: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Includes slabs and scratch memory; slabs are small here, so that layers have several."""
    monkeypatch.setattr(blockwise, "_SLAB", {"cpu": 2048})
    expected = real_peak(kind, 1, weights=weights, checkpointing=checkpointing)
    actual = dry_peak(kind, 1, weights=weights, checkpointing=checkpointing)
    assert actual == pytest.approx(expected, rel=0.001, abs=8192)  # the table of NF4's values, rebuilt each time


@pytest.mark.integration
def test_convolution_adapters() -> None:
    assert dry_peak("unet", 2, sites=EVERYWHERE) == pytest.approx(real_peak("unet", 2, sites=EVERYWHERE), rel=0.001)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("kind", "weights"),
    sampled(
        [("flux", "fp32"), ("unet", "mixed"), ("pixart", "nf4"), ("sd3", "int8")], [("unet", "mixed"), ("flux", "fp32")]
    ),
)
def test_base_bytes_exclude_codes(kind: str, weights: str) -> None:
    """Codes are pages of a file."""
    network = real(SMALL[kind], weights=weights).network
    state = dict([*network.named_parameters(), *network.named_buffers()])
    expected = sum(tensor.nbytes for name, tensor in state.items() if not name.endswith(".codes"))
    assert predicted(kind, weights=weights).base_bytes == expected
    assert (weights == "fp32") == (not any(name.endswith(".codes") for name in state))


@pytest.mark.integration
def test_dry_run_leaves_scratch_unchanged() -> None:
    before = blockwise._scratch.bytes
    predicted("unet", weights="nf4")
    assert blockwise._scratch.bytes is before
    mode = FakeTensorMode()
    packed = blockwise.QuantizedTensor(*(to_fake(tensor, mode) for tensor in blockwise.empty_quantized("nf4", 64)))
    with mode:
        blockwise.dequantize(packed, torch.Size((2, 32)))
    assert blockwise._scratch.bytes is before


def test_read_pages_count_as_workspace() -> None:
    """Only the pages of the mapped file that an operation reads."""
    mode = FakeTensorMode()
    codes = to_fake(torch.zeros(1000, dtype=torch.int8), mode)
    with mode, DryRun(storages(codes), storages(codes)) as run:
        part = codes[100:200]
        assert run.workspace_bytes == 0
        part.float()
    assert (run.workspace_bytes, run.activations_bytes) == (400 + 100, 0)


@pytest.mark.integration
def test_footprint_scales_with_arguments() -> None:
    plain = predicted("unet")
    fields = [field.name for field in dataclasses.fields(Footprint) if field.name.endswith("_bytes")]
    parts = sum(getattr(plain, name) for name in fields if name != "moved_bytes")
    assert plain.peak_bytes == parts
    again, twice = predicted("unet", checkpointing="block"), predicted("unet", batch=2, rank=2 * RANK)
    assert again.activations_bytes < plain.activations_bytes
    assert again.convolution_operations > plain.convolution_operations
    assert twice.convolution_operations == pytest.approx(2 * plain.convolution_operations, rel=0.05)
    assert 1.8 < twice.activations_bytes / plain.activations_bytes < 2.1
    assert twice.base_bytes == plain.base_bytes
    assert twice.adapter_bytes == 2 * plain.adapter_bytes


@pytest.mark.integration
def test_dequantized_weight_counts_as_workspace() -> None:
    plain = predicted("pixart")
    packed = predicted("pixart", weights="nf4")
    assert plain.workspace_bytes < packed.workspace_bytes
    assert packed.base_bytes < plain.base_bytes


@pytest.mark.parametrize(
    ("name", "resolution", "latents", "context"),
    [
        ("sd15", 512, (4, 64, 64), (77, 768)),
        ("sdxl", 1024, (4, 128, 128), (78, 2048)),
        ("flux-dev", 1024, (16, 128, 128), (514, 4096)),
        ("sana-600m", 512, (32, 16, 16), (301, 2304)),
        ("pixart-sigma", 512, (4, 64, 64), (301, 4096)),
        ("sd35-large", 768, (16, 96, 96), (334, 4096)),
    ],
)
def test_example_shapes(name: str, resolution: int, latents: tuple[int, ...], context: tuple[int, ...]) -> None:
    assert example_shapes(KNOWN_BASES[name], resolution) == (latents, context)


def test_invalid_resolution_is_refused() -> None:
    for kind, resolution in (("unet", 129), ("pixart", 136)):  # the transformer has patches of 2 × 2
        with pytest.raises(AntherError, match=f"resolution={resolution}: must be a multiple of"):
            example_shapes(SMALL[kind], resolution)


def test_operations_match_flop_counter() -> None:
    """For layers large enough to be limited by arithmetic."""
    network = nn.Sequential(nn.Conv2d(64, 96, 3, padding=1), nn.Flatten(2), nn.Linear(256, 192)).requires_grad_(False)
    x = torch.randn(1, 64, 16, 16, requires_grad=True)
    q = torch.randn(1, 2, 128, 64, requires_grad=True)

    def work(x: torch.Tensor, q: torch.Tensor) -> None:
        (network(x).sum() + F.scaled_dot_product_attention(q, q, q).sum()).backward()

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work(x, q)
    mode = FakeTensorMode()
    x, q = (to_fake(tensor, mode).requires_grad_() for tensor in (x, q))
    frozen = fake_parameters(network, mode)
    with mode, DryRun(frozen, {}) as run:
        work(x, q)
    counts = counter.get_flop_counts()["Global"]
    convolutions = sum(count for name, count in counts.items() if "convolution" in str(name))
    assert run.convolution_operations == convolutions
    scores = 2 * 128 * 128
    extra = 2 * 64 * scores  # a fused backward recomputes the scores
    extra += (EXPONENTIAL_FORWARD + EXPONENTIAL_BACKWARD) * scores
    assert run.matrix_operations == counter.get_total_flops() - convolutions + extra


CONVOLUTION = "x = torch.randn(1, 256, 64, 64); w = torch.randn(512, 256, 3, 3); g = torch.randn(1, 512, 64, 64)"
OPERATIONS = {
    "F.conv2d(x, w, None, 1, 1)": CONVOLUTION,
    "torch.nn.grad.conv2d_input(x.shape, w, g, 1, 1)": CONVOLUTION,
    "F.linear(x, w)": "x = torch.randn(4096, 512); w = torch.randn(2048, 512)",
}
SCRIPT = """
import torch
from pathlib import Path
from torch.nn import functional as F
torch.set_num_threads(1)
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
torch.set_grad_enabled(False)
{setup}
work = lambda: {work}
work()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
result = work()
print(status("VmHWM") - before)
"""


@pytest.mark.integration
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or platform.machine() != "x86_64",
    reason="peaks are read as Linux tells them, of the kernels that the model was fitted on",
)
@pytest.mark.parametrize("work", sampled(OPERATIONS, [next(iter(OPERATIONS))]), ids=lambda work: work.split("(")[0])
def test_operation_workspace_is_predicted(work: str) -> None:
    script = SCRIPT.format(setup=OPERATIONS[work], work=work)
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    space = {"torch": torch, "F": F}
    with FakeTensorMode():
        exec(OPERATIONS[work], space)
        with DryRun({}, {}) as run, torch.no_grad():
            eval(work, space)
    assert run.activations_bytes + run.workspace_bytes == pytest.approx(int(done.stdout), rel=0.15)
