"""Size of a quantized base on disk, and the memory to quantize it.

Peer libraries quantize the layers that they support in the network as loaded by diffusers, as documented; other layers
stay in float32. Peers are optional: one that is not installed has a row without numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench.lib.machine import memory
from models.base.pack import pack
from models.families.known import BaseSpec, find_base
from models.quantization.packed import FILE

OURS = ("int8", "mixed", "nf4")
TARGETS = {("sd15", "mixed"): 760e6, ("sd15", "nf4"): 540e6}
"""Targets for the network's bytes."""
PACKING = 1.2  # target in GiB for the peak while packing


def table(name: str, folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Print and yield the bytes on disk and the peak of every form, each measured in its own process."""
    print(f"{name}".ljust(24), "MB on disk", "target", "MiB while quantizing", f"(ours: ≤ {PACKING * 2**10:.0f})")
    for form in (*OURS, *PEERS):
        command = [sys.executable, "-m", "bench.memory.weights_memory", name, str(folder), form]
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        measured = json.loads(process.stdout.strip().splitlines()[-1])
        target = TARGETS.get((name, form))
        cells = f"{measured['bytes'] / 1e6:10.0f} {target / 1e6 if target else '':>6} {measured['peak'] / 2**20:20.0f}"
        print(form.ljust(24), cells if measured["bytes"] else "not installed", flush=True)
        yield form, measured


def measure(base: BaseSpec, folder: Path, form: str) -> dict[str, int]:
    """Measure one form in this process; zeros if its library is not installed.

    Args:
        base: the published base.
        folder: folder of the unpacked source.
        form: an entry of `OURS` or `PEERS`.

    Returns:
        `bytes` of the network, and `peak` bytes of this process.
    """
    if form in OURS:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pack(str(folder / "source"), Path(scratch) / form, form)
            size = (Path(scratch) / form / base.family.network / FILE).stat().st_size
        return {"bytes": size, "peak": memory("VmHWM")}
    try:
        quantize = PEERS[form]()
    except ImportError:
        return {"bytes": 0, "peak": 0}
    import diffusers  # here, because the import is slow

    kind = getattr(diffusers, base.family.kind)
    network = kind.from_pretrained(folder / "source" / base.family.network).requires_grad_(False)
    quantize(network)
    return {"bytes": tensor_bytes(network), "peak": memory("VmHWM")}


def tensor_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's tensors, including the parts of peers' tensor subclasses."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(part.nbytes for part in {id(part): part for tensor in tensors for part in _parts(tensor)}.values())


def _parts(tensor: Any) -> Iterator[Tensor]:
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, nn.Parameter):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    if state := getattr(tensor, "quant_state", None):  # bitsandbytes
        yield from (value for value in state.as_dict(packed=True).values() if isinstance(value, Tensor))


def _quanto(bits: str) -> Callable[[nn.Module], None]:
    from optimum import quanto  # optional

    def quantize(network: nn.Module) -> None:
        quanto.quantize(network, weights=getattr(quanto, bits))
        quanto.freeze(network)

    return quantize


def _torchao() -> Callable[[nn.Module], None]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # optional

    return lambda network: quantize_(network, Int8WeightOnlyConfig())


def _bitsandbytes() -> Callable[[nn.Module], None]:
    from bitsandbytes.nn import Linear4bit, Params4bit  # optional

    def quantize(network: nn.Module) -> None:
        for name, layer in list(network.named_modules()):
            if type(layer) is nn.Linear:
                quantized = Linear4bit(
                    layer.in_features, layer.out_features, bias=False, quant_type="nf4", device="meta"
                )
                quantized.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
                quantized.bias = layer.bias
                parent, _, leaf = name.rpartition(".")
                network.get_submodule(parent).register_module(leaf, quantized.to("cpu"))

    return quantize


PEERS: dict[str, Callable[[], Callable[[nn.Module], None]]] = {
    "quanto qint8": lambda: _quanto("qint8"),
    "quanto qint4": lambda: _quanto("qint4"),
    "torchao int8": _torchao,
    "bitsandbytes nf4": _bitsandbytes,
}

PACKAGES = ("optimum-quanto", "torchao", "bitsandbytes")

if __name__ == "__main__":
    print(json.dumps(measure(find_base(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
