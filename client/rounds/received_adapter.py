"""Validate the adapter that a server sent, before it is used for anything."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

from client.device import Device
from common.errors import AntherError
from models.lora import lora_xs, scaffold
from models.lora.adapter import (
    Adapter,
    Site,
    Sites,
    adapter_shapes,
    first_directions,
    from_tensors,
    rank,
    select_sites,
    split_rank,
)
from models.lora.norm_bound import norm_violation
from models.lora.scaffold import ControlVariate
from models.lora.trainable import trained_shapes
from privacy.policy import RequestRefusedError
from protocol import quantization, tensor_codec
from protocol.messages import QuantizedFormat


class AdapterParts(NamedTuple):
    """A received adapter, divided as a plan needs it."""

    start: Adapter
    """Trained factors, or the factors that contain the trained cores: the first directions, at the plan's sites."""
    frozen: Adapter | None
    """All other factors."""
    lora_xs_bases: Adapter | None
    """Frozen bases of the trained cores (LoRA-XS); None: no cores are trained."""


class ReceivedAdapter:
    """A validated adapter and its parts. All devices of a process that were sent the same bytes share one object.

    Sharing saves work and memory, here and in a pass through the base, which recognizes by object identity that one
    adapter serves all clients. Adapters are immutable.
    """

    def __init__(self, adapter: Adapter, lora_xs_bases: Adapter | None, control: ControlVariate, sha256: str) -> None:
        self.control = control  # the server's control variate, if one was sent
        self.adapter, self.rank, self.sha256, self._lora_xs_bases = adapter, rank(adapter), sha256, lora_xs_bases
        self._parts: dict[object, AdapterParts] = {}

    def parts(self, rank: int, sites: tuple[str, ...] | None = None) -> AdapterParts:
        """Return the parts for a plan of this rank at these sites; None: all sites.

        Raises RequestRefusedError if a site is unknown or listed twice, or if the list is empty.
        """
        if (rank, sites) not in self._parts:
            self._parts[rank, sites] = self._divide(rank, self.adapter if sites is None else self._checked_sites(sites))
        return self._parts[rank, sites]

    def _checked_sites(self, sites: tuple[str, ...]) -> set[str]:
        requested = set(sites)
        if unknown := min(requested - self.adapter.keys(), default=None):
            raise RequestRefusedError(
                f"the plan trains site {unknown}, which this base does not have, or which is not adapted"
            )
        if not 0 < len(requested) == len(sites):
            raise RequestRefusedError(f"the plan names {len(sites)} sites to train, {len(requested)} of them different")
        return requested

    def _divide(self, rank: int, sites: Adapter | set[str]) -> AdapterParts:
        head, tail = split_rank(select_sites(self.adapter, sites), rank)
        untrained = {name: factors for name, factors in self.adapter.items() if name not in sites}
        frozen = {**untrained, **(tail if self.rank > rank else {})}
        bases = self._lora_xs_bases
        return AdapterParts(head, frozen or None, first_directions(select_sites(bases, sites), rank) if bases else None)


def receive_adapter(
    data: bytes,
    device: Device,
    *,
    rounded: QuantizedFormat | None = None,
    with_bases: bool = False,
    controlled: str | None = None,
) -> ReceivedAdapter:
    """Decode an adapter: it must have exactly the device's sites, one rank that the owner allows, and a bounded norm.

    Args:
        data: the bytes as sent.
        device: the receiving device.
        rounded: how to decode a quantized adapter; None: full precision. Extra tensors never accompany a quantized one.
        with_bases: whether the frozen LoRA-XS bases accompany it, because cores are trained.
        controlled: the trained part; its server control variate accompanies the adapter (SCAFFOLD). None: no variate.

    Raises:
        RequestRefusedError: the bytes are invalid; the reason describes only the bytes and the base, which the server
            knows.
    """
    max_rank = device.policy.max_rank
    try:
        return _decoded(data, tuple(device.sites.items()), max_rank, rounded, with_bases, controlled)
    except AntherError as error:
        raise RequestRefusedError(
            f"the adapter sent is not one of rank 1 to {max_rank} at this device's sites: {error}"
        ) from None


@lru_cache(maxsize=1)
def _decoded(
    data: bytes,
    sites: tuple[tuple[str, Site], ...],
    max_rank: int,
    rounded: QuantizedFormat | None,
    with_bases: bool,
    controlled: str | None,
) -> ReceivedAdapter:
    if rounded:
        return ReceivedAdapter(
            _dequantized(data, dict(sites), max_rank, rounded, with_bases or controlled is not None),
            None,
            {},
            _sha256(data),
        )
    expected = adapter_shapes(dict(sites), -1, with_bases=with_bases)
    if controlled is not None:
        expected |= scaffold.control_shapes(trained_shapes(dict(sites), -1, controlled))
    tensors = tensor_codec.decode(data, expected, free=max_rank)
    adapter = _check_bounds(from_tensors(tensors))
    lora_xs_bases = lora_xs.bases_from_tensors(tensors) if with_bases else None
    return ReceivedAdapter(adapter, lora_xs_bases, scaffold.from_control_tensors(tensors), _sha256(data))


def _dequantized(data: bytes, sites: Sites, max_rank: int, rounded: QuantizedFormat, has_extra: bool) -> Adapter:
    """Decode a quantized adapter; its length is checked against its rank, and its rank against the policy."""
    if has_extra:
        raise AntherError("an adapter sent together with other tensors must not be quantized")
    if not 1 <= rounded.rank <= max_rank:
        raise AntherError(f"rank {rounded.rank}")
    return _check_bounds(
        from_tensors(quantization.decode(data, adapter_shapes(sites, rounded.rank), rounded.precision))
    )


def _check_bounds(adapter: Adapter) -> Adapter:
    if reason := norm_violation(adapter):
        raise AntherError(reason)
    return adapter


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
