"""A run of the real code on tensors without contents: what it would hold, compute and move.

Shapes, views, autograd's graph and the order in which tensors live and die are those of a real run on a CPU; only
the numbers are missing. So it takes seconds and no memory, whatever the size of the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from models.footprint.tensor_memory import LiveStorages, Storages, storages
from models.footprint.workspace import workspace

aten = torch.ops.aten

EXPONENTIAL, AGAIN = 48, 180
"""Operations of a product that take as long as what attention does beside its products with one score: in forward its
exponential, in backward that and its derivative. Measured at head sizes of 16 to 128 on a core of x86-64 with AVX-512.
"""
OPS_PER_BYTE = 8  # operations for each byte; memory, not arithmetic, sets the pace of a product that has fewer

CPU = torch.device("cpu")
_ROOM = {aten.empty, aten.new_empty}
_CONVOLUTIONS = {aten.convolution, aten.convolution_backward}


class DryRun(LiveStorages):
    """Watches operations on fake tensors.

    A tensor that is made of frozen weights alone is a slab of them, dequantised, or on the way there: it counts as
    workspace, together with what kernels take for themselves.

    Args:
        frozen: the storages of the base.
        mapped: those of them whose pages are in memory only while they are read; workspace too.

    Attributes:
        activations_bytes, workspace_bytes: when both together were most.
        matrix_operations, convolution_operations: multiplications and additions of products that arithmetic sets the
            pace of.
        moved_bytes: read and written by all other operations.
    """

    def __init__(self, frozen: Storages, mapped: Storages) -> None:
        super().__init__()
        self._frozen, self._mapped = frozen, mapped
        self._dequantised: dict[int, int] = {}  # sizes of those that live
        self.activations_bytes = self.workspace_bytes = 0
        self.matrix_operations = self.convolution_operations = self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # questions about a tensor
            return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not _touches(func, args, kwargs, result):
            return result
        weights = sum(self._dequantised.values())
        held = self.live - weights
        taken = weights + workspace(func, args, result) + self._read(args)
        if held + taken > self.activations_bytes + self.workspace_bytes:
            self.activations_bytes, self.workspace_bytes = held, taken
        self._count(func, args, kwargs or {}, result)
        return result

    def on_alloc(self, key: int, size: int, given: Storages) -> None:
        super().on_alloc(key, size, given)
        if given and all(other in self._frozen or other in self._dequantised for other in given):
            self._dequantised[key] = size

    def on_free(self, key: int, size: int) -> None:
        super().on_free(key, size)
        self._dequantised.pop(key, None)

    def _read(self, args: Any) -> int:
        """Bytes of the mapped file that an operation reads."""
        tensors = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return sum(tensor.nbytes for tensor in tensors if id(tensor.untyped_storage()) in self._mapped)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        moved = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
        found = operations(func, args, kwargs, result)
        if found < OPS_PER_BYTE * moved:
            self.moved_bytes += moved
        elif func.overloadpacket in _CONVOLUTIONS:
            self.convolution_operations += found
        else:
            self.matrix_operations += found


def _touches(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether an operation reads or writes any memory: not if it makes a view, or room for what others write."""
    if func.overloadpacket in _ROOM:
        return False
    return func._schema.is_mutable or not storages(result).keys() <= storages((args, kwargs)).keys()


def operations(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Multiplications and additions of one product, convolution or attention; 0 of anything else.

    Attention's exponentials count as so many as take the same time.
    """
    match func.overloadpacket:
        case aten._scaled_dot_product_flash_attention_for_cpu:
            return sdpa_flop_count(*(tensor.shape for tensor in args[:3])) + EXPONENTIAL * scores(*args[:2])
        case aten._scaled_dot_product_flash_attention_for_cpu_backward:
            found: int = sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
            return found + AGAIN * scores(*args[1:3])
    counter = flop_registry.get(func.overloadpacket)
    return int(counter(*args, **kwargs, out_val=result)) if counter else 0


def scores(queries: Tensor, keys: Tensor) -> int:
    """How many there are: of queries [N, h, l, d] with keys [N, h, s, d]."""
    return queries.shape[:-1].numel() * keys.shape[-2]


def to_fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of the CPU with this one's shape and type, without contents."""
    return FakeTensor(mode, tensor.detach().to("meta"), CPU)


def fake_parameters(network: nn.Module, mode: FakeTensorMode) -> dict[int, torch.UntypedStorage]:
    """Make fakes of all parameters and buffers of a network, in place; their storages.

    One that has several names stays one.
    """
    found: dict[int, Tensor] = {}
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = found.setdefault(id(tensor), to_fake(tensor, mode))  # type: ignore[assignment]
    return storages(list(found.values()))
