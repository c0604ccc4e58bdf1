"""Run the real code on tensors without data, to measure the memory, operations and traffic of a real run.

Shapes, views, autograd's graph and the order in which tensors are created and freed are those of a real run on a CPU;
only the numbers are missing. A dry run takes seconds and little memory for networks of any size.
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

EXPONENTIAL_FORWARD, EXPONENTIAL_BACKWARD = 48, 180
"""Operations of a matrix product that take as long as attention's other work per score: the exponential in forward, and
the exponential with its derivative in backward. Measured at head sizes of 16 to 128 on one core of x86-64 with AVX-512.
"""
OPS_PER_BYTE = 8  # a product with fewer operations per byte is limited by memory bandwidth, not arithmetic

CPU = torch.device("cpu")
_ALLOCATIONS = {aten.empty, aten.new_empty}
_CONVOLUTIONS = {aten.convolution, aten.convolution_backward}


class DryRun(LiveStorages):
    """Dispatch mode that records operations on fake tensors.

    A tensor computed only from frozen weights is a dequantized slab, or an intermediate of one. It counts as workspace,
    as do the temporary buffers of kernels.

    Args:
        frozen: storages of the base.
        mapped: storages in `frozen` whose pages are in memory only while they are read; they count as workspace then.

    Attributes:
        activations_bytes, workspace_bytes: at the moment when their sum is largest.
        matrix_operations, convolution_operations: multiplications and additions of products that are limited by
            arithmetic.
        moved_bytes: bytes read and written by all other operations.
    """

    def __init__(self, frozen: Storages, mapped: Storages) -> None:
        super().__init__()
        self._frozen, self._mapped = frozen, mapped
        self._dequantized: dict[int, int] = {}  # bytes of live slabs by storage id
        self.activations_bytes = self.workspace_bytes = 0
        self.matrix_operations = self.convolution_operations = self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # queries of tensor properties
            return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not _touches(func, args, kwargs, result):
            return result
        weights = sum(self._dequantized.values())
        activations = self.live - weights
        temporary = weights + workspace(func, args, result) + self._read(args)
        if activations + temporary > self.activations_bytes + self.workspace_bytes:
            self.activations_bytes, self.workspace_bytes = activations, temporary
        self._count(func, args, kwargs or {}, result)
        return result

    def on_alloc(self, key: int, size: int, inputs: Storages) -> None:
        """See `LiveStorages.on_alloc`."""
        super().on_alloc(key, size, inputs)
        if inputs and all(storage in self._frozen or storage in self._dequantized for storage in inputs):
            self._dequantized[key] = size

    def on_free(self, key: int, size: int) -> None:
        """See `LiveStorages.on_free`."""
        super().on_free(key, size)
        self._dequantized.pop(key, None)

    def _read(self, args: Any) -> int:
        """Return the bytes of the mapped file that an operation reads."""
        tensors = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return sum(tensor.nbytes for tensor in tensors if id(tensor.untyped_storage()) in self._mapped)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        moved = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
        count = count_operations(func, args, kwargs, result)
        if count < OPS_PER_BYTE * moved:
            self.moved_bytes += moved
        elif func.overloadpacket in _CONVOLUTIONS:
            self.convolution_operations += count
        else:
            self.matrix_operations += count


def _touches(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Return whether an operation reads or writes memory; views and empty allocations don't."""
    if func.overloadpacket in _ALLOCATIONS:
        return False
    return func._schema.is_mutable or not storages(result).keys() <= storages((args, kwargs)).keys()


def count_operations(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the multiplications and additions of a product, convolution or attention; 0 for other operations.

    Attention's exponentials count as the number of operations that take the same time.

    Args:
        func: overload that a dispatch mode receives.
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: its result.
    """
    match func.overloadpacket:
        case aten._scaled_dot_product_flash_attention_for_cpu:
            return sdpa_flop_count(*(tensor.shape for tensor in args[:3])) + EXPONENTIAL_FORWARD * num_scores(*args[:2])
        case aten._scaled_dot_product_flash_attention_for_cpu_backward:
            products: int = sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
            return products + EXPONENTIAL_BACKWARD * num_scores(*args[1:3])
    counter = flop_registry.get(func.overloadpacket)
    return int(counter(*args, **kwargs, out_val=result)) if counter else 0


def num_scores(queries: Tensor, keys: Tensor) -> int:
    """Return the number of attention scores of queries [N, h, l, d] and keys [N, h, s, d]."""
    return queries.shape[:-1].numel() * keys.shape[-2]


def to_fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Return a fake CPU tensor of the same shape and dtype."""
    return FakeTensor(mode, tensor.detach().to("meta"), CPU)


def fake_parameters(network: nn.Module, mode: FakeTensorMode) -> dict[int, torch.UntypedStorage]:
    """Replace all parameters and buffers of a network by fake tensors, in place.

    Tensors with several names stay shared.

    Returns:
        Their storages.
    """
    replaced: dict[int, Tensor] = {}
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = replaced.setdefault(id(tensor), to_fake(tensor, mode))  # type: ignore[assignment]
    return storages(list(replaced.values()))
