"""Updates of a round on disk, so that memory does not grow with the number of devices that reply.

Each update is written when it is accepted, as float32, and read as views of the memory-mapped file. A rule that adds
one update after another loads one at a time; a rule that iterates over all of them repeatedly pages them in. The
operating system may evict these pages at any time, since the file has their contents. Memory for derived values is up
to the rule (here: one site at a time, and constant in the number of devices for `exact` and `fedit`).

The file has no name and is deleted with the round. It is created in TMPDIR, or in /tmp: 4 bytes per number, so 6.4 MB
for a device with rank 8 at the attention layers of SD-1.5. A /tmp that is mounted in memory does not save any.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple, overload

import torch
from torch import Tensor

from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, Sites, adapter_shapes
from strategies.round.validation import ReplyRejectedError

_NUMBER = 4  # bytes

UpdateKey = tuple[str, int]
"""Device name, and round of the plan that it trained."""


class _StoredSite(NamedTuple):
    """Position of a site's factors in the file, and their shapes."""

    start: int
    rank: int
    inputs: int
    outputs: int


class _StoredUpdate(Mapping[str, Factors]):
    """Update whose sites are read on access, so that a rule that needs one site reads no others."""

    def __init__(self, file: mmap.mmap, sites: Mapping[str, _StoredSite]) -> None:
        self._map, self._sites = file, sites

    def __getitem__(self, site: str) -> Factors:
        stored = self._sites[site]
        size = stored.rank * stored.inputs
        a = self._view(stored.start, (stored.rank, stored.inputs))
        return Factors(a, self._view(stored.start + _NUMBER * size, (stored.outputs, stored.rank)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def _view(self, start: int, shape: tuple[int, int]) -> Tensor:
        count = shape[0] * shape[1]
        if not count:
            return torch.empty(shape)
        return torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=start).view(shape)


class UpdateSpool(Sequence[tuple[Adapter, float]]):
    """Updates of weight 1, sorted by key.

    Floating point sums depend on the order of their terms, and replies arrive in any order.

    Args:
        reserved_bytes: disk space to reserve, so that no update can use up the space of another one.

    Attributes:
        keys: keys of all updates, sorted.

    Raises:
        AntherError: this disk space isn't available.
    """

    def __init__(self, reserved_bytes: int = 0) -> None:
        self._file = tempfile.TemporaryFile(prefix="anther-")  # noqa: SIM115  # closed by close()
        self._end = self._file.write(bytes(_NUMBER))  # an empty file can't be mapped
        self.keys: list[UpdateKey] = []
        try:
            if reserved_bytes and hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(self._file.fileno(), 0, self._end + reserved_bytes)
        except OSError as error:
            raise AntherError(
                f"{tempfile.gettempdir()}: {error.strerror}: the updates of a round may need "
                f"{(reserved_bytes >> 20) + 1} MiB; free disk space, or set TMPDIR to another folder"
            ) from None
        self._sites: dict[UpdateKey, dict[str, _StoredSite]] = {}
        self._map: mmap.mmap | None = None

    def __enter__(self) -> UpdateSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Views that were read stay valid, and keep its disk space allocated."""
        self._file.close()

    def add(self, key: UpdateKey, adapter: Adapter) -> None:
        """Add an update.

        Raises:
            ReplyRejectedError: the disk is full.
            ValueError: updates have been read already, or the key exists.
        """
        if self._map is not None or key in self._sites:
            raise ValueError(f"{key[0]}: add each update once, and before any is read")
        sites, end = {}, self._end
        try:
            self._file.seek(end)
            for site, (a, b) in adapter.items():
                sites[site] = _StoredSite(end, len(a), a.shape[1], len(b))
                end += self._file.write(_bytes(a)) + self._file.write(_bytes(b))
            self._file.flush()
        except OSError as error:
            raise ReplyRejectedError(
                "no room", f"{key[0]}: the server can't store its update: {error.strerror}"
            ) from None
        self._sites[key], self._end = sites, end
        insort(self.keys, key)

    def __len__(self) -> int:
        return len(self._sites)

    @overload
    def __getitem__(self, index: int) -> tuple[Adapter, float]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Adapter, float]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Adapter, float] | list[tuple[Adapter, float]]:
        if isinstance(index, slice):
            return [self._update(key) for key in self.keys[index]]
        return self._update(self.keys[index])

    def _update(self, key: UpdateKey) -> tuple[Adapter, float]:
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), self._end, access=mmap.ACCESS_COPY)
        return _StoredUpdate(self._map, self._sites[key]), 1.0


def update_bytes(sites: Sites, rank: int) -> int:
    """Compute the bytes of an update of this rank at these sites."""
    return _NUMBER * sum(map(prod, adapter_shapes(sites, rank).values()))


def _bytes(factor: Tensor) -> bytes:
    return factor.float().contiguous().numpy().tobytes()
