"""The adapter that a server sent: checked before anything else is done with it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

from client.device import Device
from common.errors import AntherError
from models.lora import lora_xs, scaffold
from models.lora.adapter import Adapter, Site, Sites, adapter_shapes, from_tensors, rank, select_sites, split_rank
from models.lora.norm_bound import norm_violation
from models.lora.scaffold import ControlVariate
from models.lora.trainable import trained_shapes
from privacy.policy import RequestRefusedError
from protocol import quantization, tensor_codec
from protocol.messages import QuantizedFormat


class Parts(NamedTuple):
    """An adapter as a plan sees it."""

    start: Adapter
    """What is trained, or holds what is: the first directions, at the plan's sites."""
    frozen: Adapter | None
    """All the rest."""
    lora_xs_bases: Adapter | None
    """Of the cores, if those are trained."""


class ReceivedAdapter:
    """An adapter that was sent, and its parts: the same objects for all devices of a process that were sent the same.

    Besides the work it saves the room, here and in a pass through the base, which knows by the object that one adapter
    serves everybody. Adapters are never changed.
    """

    def __init__(self, adapter: Adapter, lora_xs_bases: Adapter | None, control: ControlVariate, sha256: str) -> None:
        self.control = control  # of the server, if one was sent
        self.adapter, self.rank, self.sha256, self._lora_xs_bases = adapter, rank(adapter), sha256, lora_xs_bases
        self._parts: dict[object, Parts] = {}

    def parts(self, rank: int, sites: tuple[str, ...] | None = None) -> Parts:
        """Those of a plan of this rank at these sites; None: at all.

        Raises Refusal for a site that the adapter has not, for none and for one that is named twice.
        """
        if (rank, sites) not in self._parts:
            self._parts[rank, sites] = self._cut(rank, self.adapter if sites is None else self._known(sites))
        return self._parts[rank, sites]

    def _known(self, sites: tuple[str, ...]) -> set[str]:
        chosen = set(sites)
        if unknown := min(chosen - self.adapter.keys(), default=None):
            raise RequestRefusedError(f"the plan trains site {unknown}, which this base has not, or is not adapted at")
        if not 0 < len(chosen) == len(sites):
            raise RequestRefusedError(f"the plan names {len(sites)} sites to train, {len(chosen)} of them different")
        return chosen

    def _cut(self, rank: int, sites: Adapter | set[str]) -> Parts:
        head, tail = split_rank(select_sites(self.adapter, sites), rank)
        beside = {name: factors for name, factors in self.adapter.items() if name not in sites}
        frozen = {**beside, **(tail if self.rank > rank else {})}
        lora_xs_bases = split_rank(select_sites(self._lora_xs_bases, sites), rank)[0] if self._lora_xs_bases else None
        return Parts(head, frozen or None, lora_xs_bases)


def receive_adapter(
    data: bytes,
    device: Device,
    *,
    rounded: QuantizedFormat | None = None,
    with_bases: bool = False,
    controlled: str | None = None,
) -> ReceivedAdapter:
    """The adapter in these bytes: exactly the device's sites, all of one rank that its owner allows, of bounded norm.

    Args:
        rounded: how it is to be read, if it isn't whole; nothing travels beside such a one.
        framed: whether the factors that stay travel beside it, since cores are to be trained.
        controlled: what is trained, where the server's control variate of that does too; None: there is none.

    Raises Refusal otherwise: the reason is about what was sent, and the base that the server knows.
    """
    most = device.policy.max_rank
    try:
        return _decoded(data, tuple(device.sites.items()), most, rounded, with_bases, controlled)
    except AntherError as error:
        raise RequestRefusedError(
            f"what was sent is no adapter of rank 1 to {most} at this device's sites: {error}"
        ) from None


@lru_cache(maxsize=1)
def _decoded(
    data: bytes,
    sites: tuple[tuple[str, Site], ...],
    most_rank: int,
    rounded: QuantizedFormat | None,
    with_bases: bool,
    controlled: str | None,
) -> ReceivedAdapter:
    if rounded:
        return ReceivedAdapter(
            _read(data, dict(sites), most_rank, rounded, with_bases or controlled is not None), None, {}, _sha256(data)
        )
    expected = adapter_shapes(dict(sites), -1, with_bases=with_bases)
    if controlled is not None:
        expected |= scaffold.control_shapes(trained_shapes(dict(sites), -1, controlled))
    tensors = tensor_codec.decode(data, expected, free=most_rank)
    adapter = _bounded(from_tensors(tensors))
    lora_xs_bases = lora_xs.bases_from_tensors(tensors) if with_bases else None
    return ReceivedAdapter(adapter, lora_xs_bases, scaffold.from_control_tensors(tensors), _sha256(data))


def _read(data: bytes, sites: Sites, most_rank: int, rounded: QuantizedFormat, beside: bool) -> Adapter:
    """An adapter in few bits: its length is held against its rank, and that against what the owner allows."""
    if beside:
        raise AntherError("what travels beside an adapter is sent whole, and so is the adapter")
    if not 1 <= rounded.rank <= most_rank:
        raise AntherError(f"rank {rounded.rank}")
    return _bounded(from_tensors(quantization.decode(data, adapter_shapes(sites, rounded.rank), rounded.precision)))


def _bounded(adapter: Adapter) -> Adapter:
    if found := norm_violation(adapter):
        raise AntherError(found)
    return adapter


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
