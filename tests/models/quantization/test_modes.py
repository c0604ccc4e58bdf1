"""Quantization types of layers in each mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.lib.tiny import ATTENTION
from bench.lib.workloads import WORKLOADS
from models.base.base import Base
from models.quantization.blockwise import empty_quantized
from models.quantization.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from models.quantization.modes import WEIGHT_MODES, quant_types, quantize_layers


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(16, 32, 3)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(64, 64)})
        self.block = nn.ModuleDict(
            {
                "time_emb_proj": nn.Linear(64, 32),
                "conv": nn.Conv2d(32, 32, 3, stride=2, padding=1),
                "depthwise": nn.Conv2d(512, 512, 3, groups=512),
                "wrapped": nn.Conv2d(32, 32, 3, padding_mode="circular"),
                "norm": nn.GroupNorm(8, 512),
                "small": nn.Linear(31, 33),
                "attention": nn.ModuleList([nn.Linear(64, 64), nn.Embedding(64, 64)]),
            }
        )
        self.conv_out = nn.Conv2d(32, 16, 3)


@pytest.mark.parametrize(
    ("mode", "linear", "convolution"),
    [("fp32", None, None), ("int8", "int8", "int8"), ("mixed", "nf4", "int8"), ("nf4", "nf4", "nf4")],
)
def test_quant_types_by_mode(mode: str, linear: str | None, convolution: str | None) -> None:
    time = linear and "int8"
    expected = {
        "time_embedding.linear_1": time,
        "block.time_emb_proj": time,
        "block.conv": convolution,
        "block.attention.0": linear,
    }
    network = Network()
    assert quant_types(network, mode) == {name: kind for name, kind in expected.items() if kind}
    names = [name for name, _ in network.named_modules()]
    quantize_layers(network, mode)
    assert [name for name, _ in network.named_modules()] == names
    types = {
        name: layer.packed.quant_type for name, layer in network.named_modules() if isinstance(layer, QuantizedLayer)
    }
    assert types == quant_types(Network(), mode)
    if convolution:
        conv = network.get_submodule("block.conv")
        assert isinstance(conv, QuantizedConv2d)
        assert isinstance(network.get_submodule("block.attention.0"), QuantizedLinear)
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)  # slot layers read it
        assert geometry == ((3, 3), (2, 2), (1, 1), (1, 1), 1)


@pytest.mark.parametrize(("mode", "limit"), [("nf4", 0.48e9), ("mixed", 0.76e9), ("int8", 0.88e9), ("fp32", 3.45e9)])
def test_stable_diffusion_size(mode: str, limit: float) -> None:
    """The real configuration on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(**WORKLOADS["sd15"].config)
    types = quant_types(network, mode)
    packed = sum(
        tensor.nbytes
        for name, kind in types.items()
        for tensor in empty_quantized(kind, network.get_submodule(name).weight.numel())
    )
    rest = sum(
        value.nbytes for name, value in network.state_dict().items() if name.removesuffix(".weight") not in types
    )
    assert 0.95 * limit < packed + rest <= limit
    sites = [name for name in types if ".attn" in name]
    assert len(sites) == (0 if mode == "fp32" else 128)


@pytest.mark.parametrize(("mode", "error"), [("int8", 0.02), ("mixed", 0.15), ("nf4", 0.3)])
def test_quantized_base_is_close(base: Base, mode: str, error: float) -> None:
    small = Base(base.folder, sites=ATTENTION, weights=mode)
    torch.manual_seed(0)
    x, t, context = torch.randn(2, *base.shape), torch.tensor([10, 700]), torch.randn(2, 8, 16)
    outputs = []
    for each in (base, small):
        with each.use_adapters([]) as denoise, torch.no_grad():
            outputs.append(denoise(x, t, context))
    expected, actual = outputs
    assert 0 < (actual - expected).norm() / expected.norm() < error
    assert small.sites == base.sites
    assert list(small.sites) == list(base.sites)


def test_config_accepts_every_mode() -> None:
    from conf.schemas.training import BaseConfig

    for mode in WEIGHT_MODES:
        BaseConfig(weights=mode)
    with pytest.raises(ValueError, match=r"base\.weights=int4"):
        BaseConfig(weights="int4")
