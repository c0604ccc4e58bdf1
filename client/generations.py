"""A device's personal adapter and those that it had before, each with the shared one under it and its date.

A new one takes the place of the present one, which is kept among the previous ones. There are few, in files of fixed
names, so that any storage holds them; which is the older is written in them. Where all are taken, the oldest goes that
isn't the only one of its base.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from client.layout import PERSONAL, PREVIOUS
from conf.errors import AntherError
from privacy.storage import Storage

MARK = b"ANTHER 1"
"""Begins each file: other tools would read its tensors as an adapter, know none of the names, and say nothing."""

UNDATED = "undated"
"""Stands for the date of one that was kept before they had any; it is older than all that have."""


class Generation(NamedTuple):
    """One personal adapter that is kept."""

    at: str
    """When it was made, ISO 8601 in UTC: by that it is named."""
    base: str
    """Content hash of its base."""
    present: bool
    """Whether it is the one in use."""


class Generations:
    """Those of one federation.

    Args:
        under: what goes before the names of its files.
        now: the device's clock.
    """

    def __init__(
        self, storage: Storage, under: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._storage, self._under, self._now = storage, under, now

    def listed(self) -> list[Generation]:
        """All that can be read, the newest first."""
        found = [(name, told) for name in (PERSONAL, *PREVIOUS) if (told := self._told(name)) is not None]
        listed = [Generation(_shown(told), told.get("base", ""), name == PERSONAL) for name, told in found]
        return sorted(listed, key=lambda one: (_order(one.at), one.present), reverse=True)

    def save(self, tensors: dict[str, Tensor], told: dict[str, str], *, aside: bool) -> None:
        """Replace the present one, under a date of its own.

        Args:
            told: what is written beside the tensors.
            aside: keep the one that is there among the previous ones. Otherwise this is that one still, and keeps its
                date.
        """
        before = self._told(PERSONAL)
        at = "" if aside or before is None else before.get("at", "")
        if aside and before is not None:
            self._keep(self._read(PERSONAL) or b"", before)
        self._storage.write(self._under + PERSONAL, MARK + save(tensors, {**told, "at": at or self._next_date()}))

    def roll_back(self, to: str | None = None) -> Generation:
        """Make a previous one the present one; the present one is kept in its place.

        Args:
            to: its date as `listed` has it; None: the newest that is older than the present one.

        Raises:
            AntherError: there is none.
        """
        told = self._told(PERSONAL)
        olds = {name: old for name in PREVIOUS if (old := self._told(name)) is not None}
        by_age = sorted(olds, key=lambda name: _order(_shown(olds[name])), reverse=True)
        if to is not None:
            fit = [name for name in by_age if _shown(olds[name]) == to]
        else:
            fit = [name for name in by_age if told is None or _is_older(olds[name], told)]
        if not fit:
            known = ", ".join(one.at for one in self.listed() if not one.present) or "none"
            where, which = self._storage.where(self._under + PERSONAL), "no previous adapter" if to is None else to
            raise AntherError(f"{where}: there is {which} to go back to; kept are: {known}")
        chosen = fit[0]
        present, back = self._read(PERSONAL), self._read(chosen) or b""
        free = next((name for name in PREVIOUS if name not in olds), None)
        if present is not None and told is not None and free:  # so that whenever this is killed, both are there
            self._storage.write(self._under + free, present)
        self._storage.write(self._under + PERSONAL, back)
        if present is not None and told is not None and not free:
            self._storage.write(self._under + chosen, present)
        else:
            self._storage.remove(self._under + chosen)
        return Generation(_shown(olds[chosen]), olds[chosen].get("base", ""), present=True)

    def _keep(self, data: bytes, told: dict[str, str]) -> None:
        """Put one among the previous ones, in the place of the one that matters least."""
        olds = {name: self._told(name) for name in PREVIOUS}
        if any(old == told and self._read(name) == data for name, old in olds.items()):
            return  # of a save that was killed half-way
        kinds = Counter(old.get("base") for old in (*olds.values(), told) if old is not None)

        def worth(name: str) -> tuple[bool, bool, str]:
            old = olds[name]
            return (False, False, "") if old is None else (True, kinds[old.get("base")] == 1, _order(_shown(old)))

        self._storage.write(self._under + min(PREVIOUS, key=worth), data)

    def _next_date(self) -> str:
        """Of now, and after every other."""
        now, last = self._now(), max((_order(one.at) for one in self.listed()), default="")
        if last and (after := datetime.fromisoformat(last) + timedelta(milliseconds=1)) > now:
            now = after
        return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def _read(self, name: str) -> bytes | None:
        return self._storage.read(self._under + name)

    def _told(self, name: str) -> dict[str, str] | None:
        """What is written beside the tensors of one that is there; None if it isn't, or is damaged."""
        data = self._read(name)
        try:
            return None if data is None else metadata(data)
        except ValueError:
            return None


def plain(data: bytes) -> bytes:
    """The safetensors bytes of one that is kept; those of before there was a mark have none."""
    return data.removeprefix(MARK)


def metadata(data: bytes) -> dict[str, str]:
    """What is written beside the tensors of one that is kept; ValueError if it is damaged."""
    data = plain(data)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length or not length:
        raise ValueError("cut short")
    told = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    load(data)
    return dict(told)


def _shown(told: dict[str, str]) -> str:
    return told.get("at") or UNDATED


def _is_older(old: dict[str, str], present: dict[str, str]) -> bool:
    """Where neither has a date, as in a store of before they had any, the previous one is the older."""
    return _order(_shown(old)) < _order(_shown(present)) or not ("at" in old or "at" in present)


def _order(at: str) -> str:
    """To be compared: dates are written in one zone and to one digit, and one without is before them."""
    return "" if at == UNDATED else at
