"""A device's current and previous personal adapters, each with its shared adapter and its date.

A new adapter replaces the current one, which is kept among the previous ones. There are few of them, in files of fixed
names, so that any storage can hold them; each file records its date. If all files are in use, the oldest adapter that
isn't the only one of its base is deleted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from client.store.layout import PERSONAL, PREVIOUS
from common.errors import AntherError
from privacy.storage import Storage

MARK = b"ANTHER 1"
"""Mark at the start of each file. Without it, other tools would load the file as an adapter and ignore all names."""

UNDATED = "undated"
"""Date of adapters stored before dates were recorded; it sorts before all dates."""


class AdapterVersion(NamedTuple):
    """One stored personal adapter."""

    at: str
    """Creation date, ISO 8601 in UTC; it identifies the adapter."""
    base: str
    """Content hash of the adapter's base."""
    present: bool
    """Whether this is the current adapter."""


class AdapterVersions:
    """Stored personal adapters of one federation.

    Args:
        under: prefix of the file names.
        now: the device's clock.
    """

    def __init__(
        self, storage: Storage, under: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._storage, self._under, self._now = storage, under, now

    def listed(self) -> list[AdapterVersion]:
        """List all readable generations, newest first."""
        found = [(name, told) for name in (PERSONAL, *PREVIOUS) if (told := self._told(name)) is not None]
        listed = [AdapterVersion(_shown(told), told.get("base", ""), name == PERSONAL) for name, told in found]
        return sorted(listed, key=lambda one: (_order(one.at), one.present), reverse=True)

    def save(self, tensors: dict[str, Tensor], told: dict[str, str], *, aside: bool) -> None:
        """Store an adapter as the current one, with its date.

        Args:
            told: metadata stored with the tensors.
            aside: keep the current adapter among the previous ones. Otherwise the new tensors are a later state of the
                same generation, and keep its date.
        """
        before = self._told(PERSONAL)
        at = "" if aside or before is None else before.get("at", "")
        if aside and before is not None:
            self._keep(self._read(PERSONAL) or b"", before)
        self._storage.write(self._under + PERSONAL, MARK + save(tensors, {**told, "at": at or self._next_date()}))

    def roll_back(self, to: str | None = None) -> AdapterVersion:
        """Make a previous adapter the current one; the current adapter takes its place.

        Args:
            to: date of the previous adapter as in `listed`; None: the newest that is older than the current one.

        Raises:
            AntherError: there is no such adapter.
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
        if present is not None and told is not None and free:  # so that both survive if the process is killed here
            self._storage.write(self._under + free, present)
        self._storage.write(self._under + PERSONAL, back)
        if present is not None and told is not None and not free:
            self._storage.write(self._under + chosen, present)
        else:
            self._storage.remove(self._under + chosen)
        return AdapterVersion(_shown(olds[chosen]), olds[chosen].get("base", ""), present=True)

    def _keep(self, data: bytes, told: dict[str, str]) -> None:
        """Store an adapter among the previous ones, in place of the least important."""
        olds = {name: self._told(name) for name in PREVIOUS}
        if any(old == told and self._read(name) == data for name, old in olds.items()):
            return  # left by a save that was killed half-way
        kinds = Counter(old.get("base") for old in (*olds.values(), told) if old is not None)

        def worth(name: str) -> tuple[bool, bool, str]:
            old = olds[name]
            return (False, False, "") if old is None else (True, kinds[old.get("base")] == 1, _order(_shown(old)))

        self._storage.write(self._under + min(PREVIOUS, key=worth), data)

    def _next_date(self) -> str:
        """Return the current time, or later, so that it follows every other date."""
        now, last = self._now(), max((_order(one.at) for one in self.listed()), default="")
        if last and (after := datetime.fromisoformat(last) + timedelta(milliseconds=1)) > now:
            now = after
        return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def _read(self, name: str) -> bytes | None:
        return self._storage.read(self._under + name)

    def _told(self, name: str) -> dict[str, str] | None:
        """Read the metadata of a stored adapter; None if it is missing or damaged."""
        data = self._read(name)
        try:
            return None if data is None else metadata(data)
        except ValueError:
            return None


def plain(data: bytes) -> bytes:
    """Return the safetensors bytes of a stored adapter; files of older versions have no format mark."""
    return data.removeprefix(MARK)


def metadata(data: bytes) -> dict[str, str]:
    """Read the metadata of a stored adapter; ValueError if it is damaged."""
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
    """Compare by date; without dates, as in stores of older versions, the previous adapter is the older."""
    return _order(_shown(old)) < _order(_shown(present)) or not ("at" in old or "at" in present)


def _order(at: str) -> str:
    """Return a sort key: dates share one time zone and precision, and a missing date sorts first."""
    return "" if at == UNDATED else at
