"""How many bytes live at once in the tensors that a piece of work makes."""

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
    """Adds up the storages that operations make, until they die. What was there before counts nothing.

    It sees forward and backward alike, and what autograd keeps between them; not what a kernel takes for itself while
    it runs.

    Attributes:
        live, peak: bytes now, and the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, Any] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in given and key not in self._known:
                self._known[key] = weakref.ref(storage, self._when_gone(key, storage.nbytes()))
                self.on_alloc(key, storage.nbytes(), given)
        self.peak = max(self.peak, self.live)
        return result

    def on_alloc(self, key: int, size: int, given: Storages) -> None:  # noqa: ARG002  # for those who ask what it is
        """A storage of `size` bytes was made by an operation on the given ones."""
        self.live += size

    def on_free(self, key: int, size: int) -> None:  # noqa: ARG002
        """Nobody holds it any more."""
        self.live -= size

    def _when_gone(self, key: int, size: int) -> Any:
        def gone(_: object) -> None:
            del self._known[key]
            self.on_free(key, size)

        return gone


def storages(tree: object) -> dict[int, torch.UntypedStorage]:
    """The distinct storages of all tensors in a nest of arguments."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {id(storage): storage for storage in found}
