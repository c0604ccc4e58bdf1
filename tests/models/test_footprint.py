"""A dry run holds to the byte what a real run holds, whatever the network, its weights and its checkpoints."""

from __future__ import annotations

import dataclasses
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conf.errors import AntherError
from models.architectures import ATTENTION
from models.denoiser import find_sites
from models.dry_run import DryRun, fake, without_contents
from models.footprint import Footprint, footprint, one_pass, prepare
from models.packing import NF4
from models.quantise import quantise_layers
from models.slots import Layout, add_slots, slot_layers
from models.storages import LiveStorages
from tests.models.networks import SMALL, real

RANK = 3


def predicted(kind: str, batch: int = 1, rank: int = RANK, **how: str) -> Footprint:
    architecture = SMALL[kind]
    network = architecture.build()
    sites = prepare(network, sites=ATTENTION, **how)
    return footprint(network, architecture.inputs(128), sites=sites, rank=rank, batch=batch)


def held(kind: str, batch: int, *, checkpoints: bool, int8: bool = False) -> int:
    """The most that a real pass holds in tensors, beside the base."""
    architecture = SMALL[kind]
    network = real(architecture)
    sites = find_sites(network, ATTENTION)
    if int8:
        quantise_layers(network)
    add_slots(network, sites)
    network.requires_grad_(False).eval()
    if checkpoints:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    layout = Layout(sites, RANK)
    with LiveStorages() as found:
        one_pass(network, architecture.inputs(128), torch.zeros(batch, layout.size), layout)
    return found.peak


def dry(kind: str, batch: int, **how: str) -> int:
    """The same of a dry run, which has workspace beside it."""
    architecture = SMALL[kind]
    network = architecture.build()
    sites = prepare(network, sites=ATTENTION, **how)
    layout, mode = Layout(sites, RANK), FakeTensorMode(allow_non_fake_inputs=True)
    with without_contents(network, mode) as frozen, mode, DryRun(frozen) as run:
        one_pass(network, architecture.inputs(128), torch.zeros(batch, layout.size), layout)
    return run.peak


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("kind", [kind for kind in SMALL if kind != "sdxl"])
def test_it_holds_what_a_real_pass_holds(kind: str, checkpointing: str) -> None:
    batch = 2 if kind == "unet" else 1
    wanted = held(kind, batch, checkpoints=checkpointing == "block")
    assert dry(kind, batch, checkpointing=checkpointing) == pytest.approx(wanted, rel=0.001)


@pytest.mark.parametrize(("kind", "checkpointing"), [("unet", "none"), ("pixart", "block")])
def test_it_holds_what_a_real_pass_through_int8_weights_holds(kind: str, checkpointing: str) -> None:
    wanted = held(kind, 1, checkpoints=checkpointing == "block", int8=True)
    assert dry(kind, 1, checkpointing=checkpointing, weights="int8") == pytest.approx(wanted, rel=0.01)


def test_the_base_is_what_its_packed_weights_take() -> None:
    for kind in ("unet", "pixart"):
        network = real(SMALL[kind])
        quantise_layers(network)
        wanted = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        assert predicted(kind, weights="int8").base_bytes == wanted


@given(st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_nf4_takes_half_a_byte_and_a_scale_for_each_block(shape: list[int]) -> None:
    count = math.prod(shape)
    blocks = len(range(0, count, 64))
    assert NF4.bytes(torch.empty(shape, device="meta")) == -(-count // 2) + 4 * blocks


def test_a_real_network_gives_the_same_and_is_left_as_it_was() -> None:
    architecture = SMALL["unet"]
    network = real(architecture)
    sites = prepare(network, sites=ATTENTION)
    before = {name: (tensor, tensor.clone()) for name, tensor in network.state_dict(keep_vars=True).items()}
    found = footprint(network, architecture.inputs(128), sites=sites, rank=RANK)
    assert found == predicted("unet")
    for name, tensor in network.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_a_network_is_put_right_when_a_run_fails() -> None:
    network = real(SMALL["unet"])
    sites = prepare(network, sites=ATTENTION)
    before = list(network.parameters())
    with pytest.raises(TypeError):
        footprint(network, SMALL["pixart"].inputs(128), sites=sites, rank=RANK)
    assert all(one is other for one, other in zip(network.parameters(), before, strict=True))
    assert not any(layer.lent for layer in slot_layers(network).values())


def test_parts_add_up_and_move_as_they_must() -> None:
    plain = predicted("unet")
    fields = [field.name for field in dataclasses.fields(Footprint) if field.name.endswith("_bytes")]
    parts = sum(getattr(plain, name) for name in fields if name != "moved_bytes")
    assert plain.peak_bytes == parts
    assert predicted("unet", checkpointing="block").activations_bytes < plain.activations_bytes
    assert predicted("unet", checkpointing="block").convolution_operations > plain.convolution_operations
    twice = predicted("unet", batch=2)
    assert twice.convolution_operations == pytest.approx(2 * plain.convolution_operations, rel=0.05)
    assert 1.8 < twice.activations_bytes / plain.activations_bytes <= 2.0
    assert twice.base_bytes == plain.base_bytes
    assert predicted("unet", rank=2 * RANK).adapter_bytes == 2 * plain.adapter_bytes
    held = [predicted("unet", weights=mode).base_bytes for mode in ("fp32", "int8", "mixed", "nf4")]
    assert held == sorted(held, reverse=True)


def test_a_weight_that_is_dequantised_is_workspace() -> None:
    plain = predicted("pixart", batch=1)
    packed = predicted("pixart", batch=1, weights="nf4")
    assert plain.workspace_bytes < packed.workspace_bytes
    assert packed.activations_bytes <= plain.activations_bytes


def test_mistakes_are_told() -> None:
    with pytest.raises(AntherError, match=r"checkpointing=some: must be one of: none, block"):
        predicted("unet", checkpointing="some")
    with pytest.raises(AntherError, match=r"base\.weights=int3: must be one of"):
        predicted("unet", weights="int3")
    with pytest.raises(AntherError, match="multiple of 8"):
        SMALL["unet"].inputs(129)


def test_operations_are_those_that_a_counter_counts() -> None:
    """Of layers that are thick enough for arithmetic to set their pace."""
    network = nn.Sequential(nn.Conv2d(64, 96, 3, padding=1), nn.Flatten(2), nn.Linear(256, 192)).requires_grad_(False)
    x = torch.randn(1, 64, 16, 16, requires_grad=True)
    q = torch.randn(1, 2, 128, 64, requires_grad=True)

    def work(x: torch.Tensor, q: torch.Tensor) -> None:
        (network(x).sum() + F.scaled_dot_product_attention(q, q, q).sum()).backward()

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work(x, q)
    mode = FakeTensorMode()
    x, q = (fake(tensor, mode).requires_grad_() for tensor in (x, q))
    with without_contents(network, mode) as frozen, mode, DryRun(frozen) as run:
        work(x, q)
    counts = counter.get_flop_counts()["Global"]
    convolutions = sum(count for name, count in counts.items() if "convolution" in str(name))
    assert run.convolution_operations == convolutions
    extra = 2 * 2 * 128 * 128 * 64  # a fused backward computes the scores again
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


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or platform.machine() != "x86_64",
    reason="peaks are read as Linux tells them, of the kernels that the model was fitted on",
)
@pytest.mark.parametrize("work", OPERATIONS, ids=lambda work: work.split("(")[0])
def test_one_operation_takes_what_is_predicted(work: str) -> None:
    script = SCRIPT.format(setup=OPERATIONS[work], work=work)
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    space = {"torch": torch, "F": F}
    with FakeTensorMode():
        exec(OPERATIONS[work], space)
        with DryRun({}) as run, torch.no_grad():
            eval(work, space)
    assert run.activations_bytes + run.workspace_bytes == pytest.approx(int(done.stdout), rel=0.15)
