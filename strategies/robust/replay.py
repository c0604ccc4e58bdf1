"""Replays: who sends nearly what was sent in an earlier round has trained nothing since.

Compared are products B A, for factors can be turned, and by probes alone: uᵀ B A v for random signs u and v, which no
device knows. E (uᵀ P v)² = ‖P‖²_F, so that the probes of two products tell how far apart those are, and no update has
to be kept to be known again. Near is what is nearer than half of the way from the adapter that was sent: honest updates
of development writers are 1.1 of it apart and more, replays that int4 has rounded 0.2. An attacker who adds as much
noise as that, or puts an old change on a new adapter, sends another product, and other rules have to find it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Sites, rank, select_sites, split_rank
from strategies.robust import Filtering
from strategies.round.validation import ReplyRejectedError
from strategies.server_optimizers import StrategyState, Tensors, kept

NEAR = 0.5
PROBES = 512  # of an adapter, about: two at a site at least
LEAST = 64  # at the sites that two updates have in common: of fewer nothing is said
HELD = 2**22  # numbers: 16 MiB of each checkpoint, the last 6,553 updates of Stable Diffusion 1.5's attentions

_PART, _SEED, _SKETCHES = "replay", "seed", "sketches"  # of the server's memory
_BITS, _WORDS = 16, 4  # a seed in numbers that float32 holds exactly

Probes = Sequence[tuple[Tensor, Tensor]]
"""Signs u [n, out] and v [n, in] for each site, float64."""
Sketches = list[tuple[str, Tensor]]
"""Of what came in a round that isn't over, let in or not, by device."""


class ReplayFilter:
    """Refuses what is nearly one of the last updates, whichever device sent that, let in or not.

    Their sketches [K, sites, 1 + n] are a part of the server's memory, oldest first, and so is the seed: whoever goes
    on with a run knows them again.

    Args:
        seed: of the probes; None: of the operating system. Who knows it moves where no probe looks.
        near: share of the way that a device went.
        held: numbers that are remembered, at most.
    """

    sensitivity = Filtering(
        bounded=False, reason="what anybody sent before is left out: one device decides whether another's counts"
    )

    def __init__(self, sites: Sites, *, seed: int | None = None, near: float = NEAR, held: int = HELD) -> None:
        if not 0 < near < 1:
            raise ValueError(f"{near=}: must be over 0 and under 1")
        self._sites, self._near = sites, near
        self._seed = secrets.randbits(_BITS * _WORDS - 1) if seed is None else seed
        self._count = max(2, -(-PROBES // max(1, len(sites))))
        self._most = max(1, held // max(1, len(sites) * (1 + self._count)))
        self._drawn: tuple[int, Probes] | None = None

    def check(self, current: Adapter, device: str, trained: Adapter, memory: StrategyState, since: Sketches) -> None:
        """RefusedError for an update that is a replay; either way it is added to what came since the last round.

        Of that the device's own are held against it and no others: the order in which replies come would decide.

        Args:
            current: that the device was sent.
        """
        before = memory.get(_PART, {})
        probes = self._probes(before)
        start, _ = split_rank(select_sites(current, trained), rank(trained))
        found = sketch(trained, self._sites, probes)
        went = (found - sketch(start, self._sites, probes))[:, 1:].square().sum(1)
        found = kept(found)
        seen = [before[_SKETCHES]] if _SKETCHES in before else []
        seen += [one[None] for name, one in since if name == device]
        since.append((device, found))
        if seen and (relative_distances(found, torch.cat(seen), went) < self._near).any():
            raise ReplyRejectedError("replayed", f"{device}: nearly what was sent in an earlier round")

    def remember(self, memory: StrategyState, since: Sketches) -> StrategyState:
        """The memory after a round in which these came."""
        before = memory.get(_PART, {})
        rows = [before[_SKETCHES]] if _SKETCHES in before else []
        rows += [one[None] for _, one in sorted(since, key=lambda named: named[0])]
        seen = {_SKETCHES: torch.cat(rows)[-self._most :]} if rows else {}
        return {**memory, _PART: {_SEED: _words(self._seed_in(before)), **seen}}

    def _seed_in(self, before: Tensors) -> int:
        return _number(before[_SEED]) if _SEED in before else self._seed

    def _probes(self, before: Tensors) -> Probes:
        seed = self._seed_in(before)
        if self._drawn is None or self._drawn[0] != seed:
            self._drawn = seed, draw(self._sites, self._count, seed)
        return self._drawn[1]


def draw(sites: Sites, count: int, seed: int) -> Probes:
    """So many for each site."""

    def signs(size: int, *key: str) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, *key))
        return torch.randint(2, (count, size), generator=generator).double() * 2 - 1

    return [(signs(site.outputs, name, "u"), signs(site.inputs, name, "v")) for name, site in sites.items()]


def sketch(adapter: Adapter, sites: Sites, probes: Probes) -> Tensor:
    """Whether each site was trained, and uᵀ B A v there, float64 [sites, 1 + n]; zeros where it was not."""
    found = torch.zeros(len(sites), 1 + (len(probes[0][0]) if probes else 0), dtype=torch.float64)
    for row, name, (u, v) in zip(found, sites, probes, strict=True):
        if name in adapter and len(adapter[name].a):
            a, b = adapter[name]
            row[0], row[1:] = 1.0, ((u @ b.double()) * (v @ a.double().T)).sum(1)
    return found


def relative_distances(one: Tensor, seen: Tensor, went: Tensor) -> Tensor:
    """‖P − P_k‖ / ‖P − P_start‖ for each of K that were seen [K], over the sites that both trained.

    Infinite where those have fewer than `LEAST` probes, or nothing moved: who stays where the server stands repeats
    what that sent, and is for other rules.

    Args:
        went: ‖P − P_start‖² at each site, by the same probes [sites].
    """
    common = (seen[..., 0] * one[:, 0]).double()
    apart = ((seen[..., 1:] - one[:, 1:]).square().sum(-1) * common).sum(-1)
    moved = (went * common).sum(-1)
    known = (common.sum(-1) * (one.shape[1] - 1) >= LEAST) & (moved > 0)
    return (apart / moved).sqrt().where(known, torch.inf)


def _words(seed: int) -> Tensor:
    """A seed as a checkpoint keeps it."""
    return torch.tensor([float(seed >> _BITS * place & 2**_BITS - 1) for place in range(_WORDS)])


def _number(words: Tensor) -> int:
    return sum(int(word) << _BITS * place for place, word in enumerate(words.tolist()))
