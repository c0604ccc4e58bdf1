"""Track the bytes of live tensors that a piece of code creates."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Storages = Mapping[int, torch.UntypedStorage]
"""Distinct storages by their id."""


class LiveStorages(TorchDispatchMode):
    """Dispatch mode that sums the bytes of storages from their creation until they are freed.

    Storages that existed before are not counted.

    Covers forward, backward and tensors saved by autograd, but not the temporary buffers of kernels.

    Attributes:
        live, peak: bytes now, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, Any] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in inputs and key not in self._known:
                self._known[key] = weakref.ref(storage, self._free_hook(key, storage.nbytes()))
                self.on_alloc(key, storage.nbytes(), inputs)
        self.peak = max(self.peak, self.live)
        return result

    def on_alloc(self, key: int, size: int, inputs: Storages) -> None:  # noqa: ARG002  # subclasses use `inputs`
        """Count a storage that an operation has created.

        Args:
            key: id of the storage.
            size: bytes of the storage.
            inputs: storages of the operation's inputs, by id.
        """
        self.live += size

    def on_free(self, key: int, size: int) -> None:  # noqa: ARG002
        """Subtract a storage of `size` bytes that was freed."""
        self.live -= size

    def _free_hook(self, key: int, size: int) -> Any:
        def free(_: object) -> None:
            del self._known[key]
            self.on_free(key, size)

        return free


def storages(tree: object) -> dict[int, torch.UntypedStorage]:
    """Return the distinct storages of all tensors in a nested structure, by id."""
    leaves = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {id(storage): storage for storage in leaves}
