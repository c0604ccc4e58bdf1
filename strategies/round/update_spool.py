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
from torch._utils import _flatten_dense_tensors

from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, Sites, adapter_shapes
from strategies.round.validation import ReplyRejectedError

_NUMBER = 4  # bytes

UpdateKey = tuple[str, int]
"""Device name, and round of the plan that it trained."""


class _StoredSite(NamedTuple):
    """Position of a site's factors within an update, in numbers, and their shapes."""

    start: int
    rank: int
    inputs: int
    outputs: int


_Layout = dict[str, _StoredSite]


class _StoredUpdate(Mapping[str, Factors]):
    """Update whose sites are read on access, so that a rule that needs one site reads no others."""

    def __init__(self, numbers: Tensor, start: int, layout: _Layout) -> None:
        self._numbers, self._start, self._layout = numbers, start, layout

    def __getitem__(self, site: str) -> Factors:
        offset, rank, inputs, outputs = self._layout[site]
        offset += self._start
        return Factors(
            torch.as_strided(self._numbers, (rank, inputs), (inputs, 1), offset),
            torch.as_strided(self._numbers, (outputs, rank), (rank, 1), offset + rank * inputs),
        )

    def __contains__(self, site: object) -> bool:
        return site in self._layout

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


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
        self._stored: dict[UpdateKey, tuple[int, _Layout]] = {}  # start in the file, in numbers
        self._layouts: dict[tuple[tuple[str, torch.Size, torch.Size], ...], _Layout] = {}  # shared by equal updates
        self._numbers: Tensor | None = None  # the mapped file

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
        if self._numbers is not None or key in self._stored:
            raise ValueError(f"{key[0]}: add each update once, and before any is read")
        size = 0
        try:
            self._file.seek(self._end)
            if adapter:
                numbers = _flatten_dense_tensors([factor.float() for pair in adapter.values() for factor in pair])
                size = self._file.write(numbers.detach().view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise ReplyRejectedError(
                "no room", f"{key[0]}: the server can't store its update: {error.strerror}"
            ) from None
        self._stored[key] = self._end // _NUMBER, self._layout(adapter)
        self._end += size
        insort(self.keys, key)

    def _layout(self, adapter: Adapter) -> _Layout:
        shapes = tuple((site, a.shape, b.shape) for site, (a, b) in adapter.items())
        if shapes not in self._layouts:
            layout, start = {}, 0
            for site, (rank, inputs), (outputs, _) in shapes:
                layout[site] = _StoredSite(start, rank, inputs, outputs)
                start += rank * (inputs + outputs)
            self._layouts[shapes] = layout
        return self._layouts[shapes]

    def stack(self, site: str) -> tuple[Factors, Tensor] | None:
        """Return the factors of all updates at a site, as views of the file.

        Returns:
            A `[K, r, in]` and B `[K, out, r]` in the order of arrival, and their indices `[K]` in the order of the
            keys; None if updates differ in their sites or shapes, or none has this site.
        """
        if len(self._layouts) != 1 or site not in (layout := next(iter(self._layouts.values()))):
            return None
        starts = [self._stored[key][0] for key in self.keys]
        numbers, first, count = self._mapped(), min(starts), len(starts)
        step = (self._end // _NUMBER - first) // count  # updates follow each other without gaps
        offset, rank, inputs, outputs = layout[site]
        offset += first
        a = torch.as_strided(numbers, (count, rank, inputs), (step, inputs, 1), offset)
        b = torch.as_strided(numbers, (count, outputs, rank), (step, rank, 1), offset + rank * inputs)
        return Factors(a, b), torch.tensor([(start - first) // max(1, step) for start in starts])

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> tuple[Adapter, float]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Adapter, float]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Adapter, float] | list[tuple[Adapter, float]]:
        if isinstance(index, slice):
            return [self._update(key) for key in self.keys[index]]
        return self._update(self.keys[index])

    def _update(self, key: UpdateKey) -> tuple[Adapter, float]:
        return _StoredUpdate(self._mapped(), *self._stored[key]), 1.0

    def _mapped(self) -> Tensor:
        if self._numbers is None:
            mapped = mmap.mmap(self._file.fileno(), self._end, access=mmap.ACCESS_COPY)
            self._numbers = torch.frombuffer(mapped, dtype=torch.float32)
        return self._numbers


def update_bytes(sites: Sites, rank: int) -> int:
    """Compute the bytes of an update of this rank at these sites."""
    return _NUMBER * sum(map(prod, adapter_shapes(sites, rank).values()))
