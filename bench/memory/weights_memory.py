"""What a base takes at rest: its network's bytes in few bits, and the memory that it takes to get there.

Peers quantise the layers that they can in the network that diffusers loaded, whole, as their manuals say; what they
leave stays in float32. One that isn't installed is a row without numbers: none of them is needed.
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
from models.families.known import BaseSpec, find_base
from models.quantization.pack import pack
from models.quantization.packed import FILE

OURS = ("int8", "mixed", "nf4")
TARGETS = {("sd15", "mixed"): 760e6, ("sd15", "nf4"): 540e6}
"""Bytes of the network at rest."""
PACKING = 1.2  # GiB while it is packed


def table(name: str, folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Every form's bytes at rest and peak, each found in a process of its own; printed as they come."""
    print(f"{name}".ljust(24), "MB at rest", "wanted", "MiB while it is made", f"(ours: ≤ {PACKING * 2**10:.0f})")
    for form in (*OURS, *PEERS):
        command = [sys.executable, "-m", "bench.memory.weights_memory", name, str(folder), form]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        goal = TARGETS.get((name, form))
        sizes = f"{found['bytes'] / 1e6:10.0f} {goal / 1e6 if goal else '':>6} {found['peak'] / 2**20:20.0f}"
        print(form.ljust(24), sizes if found["bytes"] else "not installed", flush=True)
        yield form, found


def measure(base: BaseSpec, folder: Path, form: str) -> dict[str, int]:
    """One form, in this process; nothing if its library isn't there."""
    if form in OURS:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pack(str(folder / "source"), Path(scratch) / form, form)
            size = (Path(scratch) / form / base.family.network / FILE).stat().st_size
        return {"bytes": size, "peak": memory("VmHWM")}
    try:
        quantize = PEERS[form]()
    except ImportError:
        return {"bytes": 0, "peak": 0}
    import diffusers  # slow import, so only here

    kind = getattr(diffusers, base.family.kind)
    network = kind.from_pretrained(folder / "source" / base.family.network).requires_grad_(False)
    quantize(network)
    return {"bytes": held(network), "peak": memory("VmHWM")}


def held(network: nn.Module) -> int:
    """Bytes of a network's tensors, with those that tensors of a peer's own kinds are made of."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(part.nbytes for part in {id(part): part for tensor in tensors for part in _parts(tensor)}.values())


def _parts(tensor: Any) -> Iterator[Tensor]:
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, nn.Parameter):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    if state := getattr(tensor, "quant_state", None):  # of bitsandbytes
        yield from (value for value in state.as_dict(packed=True).values() if isinstance(value, Tensor))


def _quanto(bits: str) -> Callable[[nn.Module], None]:
    from optimum import quanto  # a peer, so only here

    def quantize(network: nn.Module) -> None:
        quanto.quantize(network, weights=getattr(quanto, bits))
        quanto.freeze(network)

    return quantize


def _torchao() -> Callable[[nn.Module], None]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # a peer, so only here

    return lambda network: quantize_(network, Int8WeightOnlyConfig())


def _bitsandbytes() -> Callable[[nn.Module], None]:
    from bitsandbytes.nn import Linear4bit, Params4bit  # a peer, so only here

    def quantize(network: nn.Module) -> None:
        for name, layer in list(network.named_modules()):
            if type(layer) is nn.Linear:
                made = Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4", device="meta")
                made.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
                made.bias = layer.bias
                parent, _, leaf = name.rpartition(".")
                network.get_submodule(parent).register_module(leaf, made.to("cpu"))

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
