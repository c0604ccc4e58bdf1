"""Replay filter: reject an update that nearly equals one sent in an earlier round.

It compares products B A, since factors can be rotated, and only by probes: uᵀ B A v for random signs u and v that no
device knows. E (uᵀ P v)² = ‖P‖²_F, so the probes of two products give their distance, and no update has to be stored.
An update is a replay if its distance from an earlier one is less than half of its distance from the adapter that was
sent. Honest updates of development writers have a ratio of 1.1 and more, replays quantized to int4 0.2. An attacker who
adds that much noise, or applies an old change to a new adapter, sends another product, and other rules have to find it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Sites, first_directions, rank, select_sites
from strategies.robust import Filtering, robust_rule
from strategies.round.updates import Sketches
from strategies.round.validation import ReplyRejectedError
from strategies.server_optimizers import StrategyState, Tensors, as_stored

THRESHOLD = 0.5
PROBES = 512  # approximate number per adapter, at least two per site
MIN_PROBES = 64  # at the sites that two updates have in common; with fewer they are not compared
CAPACITY = 2**22  # numbers: 16 MiB of each checkpoint, the last 6,553 updates of Stable Diffusion 1.5's attentions

_PART, _SEED, _SKETCHES = "replay", "seed", "sketches"  # keys of the strategy state; stored, don't change
_BITS, _WORDS = 16, 4  # a seed as numbers that float32 represents exactly

Probes = Sequence[tuple[Tensor, Tensor]]
"""Signs u `[n, out]` and v `[n, in]` for each site, float64."""


@robust_rule("replay")
class ReplayFilter:
    """Reject an update that nearly equals one of the last updates of any device, accepted or not.

    Their sketches `[K, sites, 1 + n]`, oldest first, and the seed are part of the strategy state, so that a resumed run
    recognizes them.

    Args:
        sites: sites of the adapter.
        seed: seed of the probes; None: from the operating system. An attacker who knows it can change an update in
            directions that no probe measures.
        threshold: maximum distance of a replay, as a fraction of the distance from the adapter that was sent.
        capacity: maximum number of float32 values in the stored sketches.
    """

    sensitivity = Filtering(
        bounded=False,
        reason="updates that any device sent before are rejected: one device affects whether another one counts",
    )

    def __init__(
        self, sites: Sites, *, seed: int | None = None, threshold: float = THRESHOLD, capacity: int = CAPACITY
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"{threshold=}: must be over 0 and under 1")
        self._sites, self._threshold = sites, threshold
        self._seed = secrets.randbits(_BITS * _WORDS - 1) if seed is None else seed
        self._count = max(2, -(-PROBES // max(1, len(sites))))
        self._max_sketches = max(1, capacity // max(1, len(sites) * (1 + self._count)))
        self._cached_probes: tuple[int, Probes] | None = None

    def check(
        self, current: Adapter, device: str, trained: Adapter, state: StrategyState, round_sketches: Sketches
    ) -> None:
        """Reject an update that is a replay, and append its sketch to `round_sketches` in either case.

        Within `round_sketches`, the update is compared only with those of the same device: otherwise the order of
        arrival would decide.

        Args:
            current: adapter that was sent to the device.
            device: name of the device.
            trained: its update.
            state: strategy state after the previous round.
            round_sketches: sketches of this round so far.

        Raises:
            ReplyRejectedError: the update is a replay.
        """
        stored = state.get(_PART, {})
        probes = self._probes(stored)
        start = first_directions(select_sites(current, trained), rank(trained))
        new = sketch(trained, self._sites, probes)
        change = (new - sketch(start, self._sites, probes))[:, 1:].square().sum(1)
        new = as_stored(new)
        earlier = [stored[_SKETCHES]] if _SKETCHES in stored else []
        earlier += [one[None] for name, one in round_sketches if name == device]
        round_sketches.append((device, new))
        if earlier and (relative_distances(new, torch.cat(earlier), change) < self._threshold).any():
            raise ReplyRejectedError("replayed", f"{device}: nearly equals an update of an earlier round")

    def remember(self, state: StrategyState, round_sketches: Sketches) -> StrategyState:
        """Return the strategy state after a round with these sketches."""
        stored = state.get(_PART, {})
        rows = [stored[_SKETCHES]] if _SKETCHES in stored else []
        rows += [one[None] for _, one in sorted(round_sketches, key=lambda named: named[0])]
        latest = {_SKETCHES: torch.cat(rows)[-self._max_sketches :]} if rows else {}
        return {**state, _PART: {_SEED: _seed_to_words(self._stored_seed(stored)), **latest}}

    def _stored_seed(self, stored: Tensors) -> int:
        return _words_to_seed(stored[_SEED]) if _SEED in stored else self._seed

    def _probes(self, stored: Tensors) -> Probes:
        seed = self._stored_seed(stored)
        if self._cached_probes is None or self._cached_probes[0] != seed:
            self._cached_probes = seed, draw_probes(self._sites, self._count, seed)
        return self._cached_probes[1]


def draw_probes(sites: Sites, count: int, seed: int) -> Probes:
    """Draw random signs for each site.

    Args:
        sites: dimensions by name.
        count: n, number of probes per site.
        seed: seed of the signs.

    Returns:
        u `[n, out]` and v `[n, in]` for each site, float64.
    """

    def signs(size: int, *key: str) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, *key))
        return torch.randint(2, (count, size), generator=generator).double() * 2 - 1

    return [(signs(site.outputs, name, "u"), signs(site.inputs, name, "v")) for name, site in sites.items()]


def sketch(adapter: Adapter, sites: Sites, probes: Probes) -> Tensor:
    """Compute uᵀ B A v for each probe.

    Args:
        adapter: trained factors.
        sites: all sites.
        probes: n probes for each site.

    Returns:
        Float64 `[sites, 1 + n]`: 1 and the values of the probes; zeros for an untrained site.
    """
    rows = torch.zeros(len(sites), 1 + (len(probes[0][0]) if probes else 0), dtype=torch.float64)
    for row, name, (u, v) in zip(rows, sites, probes, strict=True):
        if name in adapter and len(adapter[name].a):
            a, b = adapter[name]
            row[0], row[1:] = 1.0, ((u @ b.double()) * (v @ a.double().T)).sum(1)
    return rows


def relative_distances(new: Tensor, earlier: Tensor, change: Tensor) -> Tensor:
    """Compute ‖P − P_k‖ / ‖P − P_start‖ over the sites that both updates trained.

    Infinite if these sites have fewer than `MIN_PROBES` probes, or nothing changed: an unchanged adapter repeats the
    download and is left to other rules.

    Args:
        new: sketch of P `[sites, 1 + n]`.
        earlier: sketches of P_k `[K, sites, 1 + n]`.
        change: ‖P − P_start‖² at each site, by the same probes `[sites]`.

    Returns:
        `[K]`.
    """
    common = (earlier[..., 0] * new[:, 0]).double()
    distances = ((earlier[..., 1:] - new[:, 1:]).square().sum(-1) * common).sum(-1)
    moved = (change * common).sum(-1)
    comparable = (common.sum(-1) * (new.shape[1] - 1) >= MIN_PROBES) & (moved > 0)
    return (distances / moved).sqrt().where(comparable, torch.inf)


def _seed_to_words(seed: int) -> Tensor:
    """Split a seed into the float32 words that a checkpoint stores."""
    return torch.tensor([float(seed >> _BITS * index & 2**_BITS - 1) for index in range(_WORDS)])


def _words_to_seed(words: Tensor) -> int:
    return sum(int(word) << _BITS * index for index, word in enumerate(words.tolist()))
