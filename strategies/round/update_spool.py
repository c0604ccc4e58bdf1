"""The updates of a round, on disk: what a round takes in memory doesn't grow with the devices that reply.

Each is written as it is let in, whole and in float32, and read as views of the file, mapped into memory: a rule that
takes in one after another holds one, and one that goes through all of them again and again pages them in. The system
may take such pages back at any time, since they are as the file has them; what a rule makes of them is its own to
bound (of ours: a site at a time, and with `exact` and `fedit` no more for more devices).

The file has no name and goes with the round. It lies where TMPDIR says, or in /tmp: 4 bytes a number, so 6.4 MB for
a device with rank 8 at the attention of SD-1.5. A /tmp that is in memory is no disk.
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
"""Of an update: the device's name, and the round of the plan that it followed."""


class _Place(NamedTuple):
    """Where a site's factors begin in the file, and their sides."""

    start: int
    rank: int
    inputs: int
    outputs: int


class _Read(Mapping[str, Factors]):
    """An update, of whose sites each is read when it is asked for: a rule that goes by sites reads no others."""

    def __init__(self, held: mmap.mmap, places: Mapping[str, _Place]) -> None:
        self._map, self._places = held, places

    def __getitem__(self, site: str) -> Factors:
        place = self._places[site]
        size = place.rank * place.inputs
        a = self._view(place.start, (place.rank, place.inputs))
        return Factors(a, self._view(place.start + _NUMBER * size, (place.outputs, place.rank)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _view(self, start: int, shape: tuple[int, int]) -> Tensor:
        count = shape[0] * shape[1]
        if not count:
            return torch.empty(shape)
        return torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=start).view(shape)


class UpdateSpool(Sequence[tuple[Adapter, float]]):
    """Updates of equal weight in the order of their keys, whichever order they came in.

    Floating point sums depend on the order, and replies arrive in any.

    Args:
        room: bytes that are held on the disk from the start: then no update takes another's place there.

    Attributes:
        keys: of all updates, in order.

    AntherError if they aren't free.
    """

    def __init__(self, room: int = 0) -> None:
        self._file = tempfile.TemporaryFile(prefix="anther-")  # noqa: SIM115  # closed at exit
        self._end = self._file.write(bytes(_NUMBER))  # nothing at all can't be mapped
        self.keys: list[UpdateKey] = []
        try:
            if room and hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(self._file.fileno(), 0, self._end + room)
        except OSError as error:
            raise AntherError(
                f"{tempfile.gettempdir()}: {error.strerror}: a round's updates may take {(room >> 20) + 1} MiB there; "
                "make room, or name another folder in TMPDIR"
            ) from None
        self._places: dict[UpdateKey, dict[str, _Place]] = {}
        self._map: mmap.mmap | None = None

    def __enter__(self) -> UpdateSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Views that were read stay, and the room of the file until they go."""
        self._file.close()

    def add(self, key: UpdateKey, adapter: Adapter) -> None:
        """One more, before any is read.

        Raises:
            RefusedError: the disk is full.
            ValueError: updates are read already, or this one is there.
        """
        if self._map is not None or key in self._places:
            raise ValueError(f"{key[0]}: an update comes once, and before any is read")
        places, end = {}, self._end
        try:
            self._file.seek(end)
            for site, (a, b) in adapter.items():
                places[site] = _Place(end, len(a), a.shape[1], len(b))
                end += self._file.write(_bytes(a)) + self._file.write(_bytes(b))
            self._file.flush()
        except OSError as error:
            raise ReplyRejectedError(
                "no room", f"{key[0]}: the server can't store its update: {error.strerror}"
            ) from None
        self._places[key], self._end = places, end
        insort(self.keys, key)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> tuple[Adapter, float]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[Adapter, float]]: ...
    def __getitem__(self, place: int | slice) -> tuple[Adapter, float] | list[tuple[Adapter, float]]:
        if isinstance(place, slice):
            return [self._update(key) for key in self.keys[place]]
        return self._update(self.keys[place])

    def _update(self, key: UpdateKey) -> tuple[Adapter, float]:
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), self._end, access=mmap.ACCESS_COPY)
        return _Read(self._map, self._places[key]), 1.0


def size(sites: Sites, rank: int) -> int:
    """Bytes of an update of this rank at these sites."""
    return _NUMBER * sum(map(prod, adapter_shapes(sites, rank).values()))


def _bytes(factor: Tensor) -> bytes:
    return factor.float().contiguous().numpy().tobytes()
