"""The adapter that a server sent: checked before anything else is done with it."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from client.device import Device
from conf.errors import AntherError
from models import controls, cores
from models.adapter import Adapter, Site, Sites, from_tensors, head_and_tail, rank, shapes
from models.bounds import excess
from models.controls import Control
from privacy.policy import Refusal
from protocol import codec, rounding
from protocol.messages import Rounded


class Sent:
    """An adapter that was sent, and its parts: the same objects for all devices of a process that were sent the same.

    Besides the work it saves the room, here and in a pass through the base, which knows by the object that one adapter
    serves everybody. Adapters are never changed.
    """

    def __init__(self, adapter: Adapter, frame: Adapter | None, control: Control, sha256: str) -> None:
        self.control = control  # of the server, if one was sent
        self.adapter, self.rank, self.sha256, self._frame = adapter, rank(adapter), sha256, frame
        self._parts: dict[int, tuple[Adapter, Adapter | None, Adapter | None]] = {}

    def parts(self, rank: int) -> tuple[Adapter, Adapter | None, Adapter | None]:
        """What a plan of this rank trains, what stays frozen beside it, and the frame of the cores, if it is those."""
        if rank not in self._parts:
            head, tail = head_and_tail(self.adapter, rank)
            frame = head_and_tail(self._frame, rank)[0] if self._frame else None
            self._parts[rank] = head, tail if self.rank > rank else None, frame
        return self._parts[rank]


def received(
    data: bytes, device: Device, *, rounded: Rounded | None = None, framed: bool = False, controlled: bool = False
) -> Sent:
    """The adapter in these bytes: exactly the device's sites, all of one rank that its owner allows, of bounded norm.

    Args:
        rounded: how it is to be read, if it isn't whole; nothing travels beside such a one.
        framed: whether the factors that stay travel beside it, since cores are to be trained.
        controlled: whether the server's control variate does, which corrects what is trained.

    Raises Refusal otherwise: the reason is about what was sent, and the base that the server knows.
    """
    most = device.policy.max_rank
    try:
        return _decoded(data, tuple(device.sites.items()), most, rounded, framed, controlled)
    except AntherError as error:
        raise Refusal(f"what was sent is no adapter of rank 1 to {most} at this device's sites: {error}") from None


@lru_cache(maxsize=1)
def _decoded(
    data: bytes, sites: tuple[tuple[str, Site], ...], most_rank: int, rounded: Rounded | None, framed: bool,
    controlled: bool,
) -> Sent:  # fmt: skip
    if rounded:
        return Sent(_read(data, dict(sites), most_rank, rounded, framed or controlled), None, {}, _sha256(data))
    expected = shapes(dict(sites), -1, frame=framed)
    if controlled:
        trained = cores.core_shapes(dict(sites), -1) if framed else shapes(dict(sites), -1)
        expected |= controls.beside_shapes(trained)
    tensors = codec.decode(data, expected, free=most_rank)
    adapter = _bounded(from_tensors(tensors))
    frame = cores.frame_from_tensors(tensors) if framed else None
    return Sent(adapter, frame, controls.apart(tensors), _sha256(data))


def _read(data: bytes, sites: Sites, most_rank: int, rounded: Rounded, beside: bool) -> Adapter:
    """An adapter in few bits: its length is held against its rank, and that against what the owner allows."""
    if beside:
        raise AntherError("what travels beside an adapter is sent whole, and so is the adapter")
    if not 1 <= rounded.rank <= most_rank:
        raise AntherError(f"rank {rounded.rank}")
    return _bounded(from_tensors(rounding.decode(data, shapes(sites, rounded.rank), rounded.precision)))


def _bounded(adapter: Adapter) -> Adapter:
    if found := excess(adapter):
        raise AntherError(found)
    return adapter


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
