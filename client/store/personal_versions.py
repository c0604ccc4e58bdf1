"""A device's current and previous personal adapters, each with its shared adapter and its date.

A new adapter replaces the current one, which becomes a previous one. Their number is small, and their file names are
fixed, so that any storage supports them; each file records its date. If all files are in use, the oldest adapter that
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
    """One stored version of the personal adapter."""

    created: str
    """Creation date, ISO 8601 in UTC; it identifies the adapter."""
    base: str
    """Content hash of the adapter's base."""
    is_current: bool
    """Whether this is the current adapter."""


class AdapterVersions:
    """Stored personal adapters of one federation.

    Args:
        storage: the device's storage.
        prefix: prefix of the file names.
        now: the device's clock.
    """

    def __init__(
        self, storage: Storage, prefix: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._storage, self._prefix, self._now = storage, prefix, now

    def all_versions(self) -> list[AdapterVersion]:
        """List all readable versions, newest first."""
        readable = [
            (name, metadata) for name in (PERSONAL, *PREVIOUS) if (metadata := self._metadata(name)) is not None
        ]
        all_versions = [
            AdapterVersion(_date(metadata), metadata.get("base", ""), name == PERSONAL) for name, metadata in readable
        ]
        return sorted(all_versions, key=lambda version: (_order(version.created), version.is_current), reverse=True)

    def save(self, tensors: dict[str, Tensor], metadata: dict[str, str], *, aside: bool) -> None:
        """Store an adapter as the current one, with its date.

        Args:
            tensors: the tensors by name.
            metadata: metadata stored with the tensors.
            aside: move the current adapter to the previous ones. Otherwise the new tensors are a later state of the
                same version, and get its date.
        """
        current = self._metadata(PERSONAL)
        date = "" if aside or current is None else current.get("at", "")
        if aside and current is not None:
            self._archive(self._read(PERSONAL) or b"", current)
        self._storage.write(
            self._prefix + PERSONAL, MARK + save(tensors, {**metadata, "at": date or self._next_date()})
        )

    def roll_back(self, to: str | None = None) -> AdapterVersion:
        """Make a previous adapter the current one; the current adapter takes its place.

        Args:
            to: date of the previous adapter as in `all_versions`; None: the newest that is older than the current one.

        Raises:
            AntherError: there is no such adapter.
        """
        current = self._metadata(PERSONAL)
        previous = {name: metadata for name in PREVIOUS if (metadata := self._metadata(name)) is not None}
        by_age = sorted(previous, key=lambda name: _order(_date(previous[name])), reverse=True)
        if to is not None:
            candidates = [name for name in by_age if _date(previous[name]) == to]
        else:
            candidates = [name for name in by_age if current is None or _is_older(previous[name], current)]
        if not candidates:
            known = ", ".join(version.created for version in self.all_versions() if not version.is_current) or "none"
            where, which = (
                self._storage.where(self._prefix + PERSONAL),
                "no previous adapter" if to is None else f"no adapter of {to}",
            )
            raise AntherError(f"{where}: {which}; available: {known}")
        name = candidates[0]
        current_data, new_data = self._read(PERSONAL), self._read(name) or b""
        free = next((name for name in PREVIOUS if name not in previous), None)
        if current_data is not None and current is not None and free:
            # Copied first, so that both survive if the process is killed here.
            self._storage.write(self._prefix + free, current_data)
        self._storage.write(self._prefix + PERSONAL, new_data)
        if current_data is not None and current is not None and not free:
            self._storage.write(self._prefix + name, current_data)
        else:
            self._storage.remove(self._prefix + name)
        return AdapterVersion(_date(previous[name]), previous[name].get("base", ""), is_current=True)

    def _archive(self, data: bytes, metadata: dict[str, str]) -> None:
        """Store an adapter among the previous ones, in place of the least important."""
        previous = {name: self._metadata(name) for name in PREVIOUS}
        if any(entry == metadata and self._read(name) == data for name, entry in previous.items()):
            return  # written by an earlier save that was killed before its end
        kinds = Counter(entry.get("base") for entry in (*previous.values(), metadata) if entry is not None)

        def worth(name: str) -> tuple[bool, bool, str]:
            entry = previous[name]
            return (False, False, "") if entry is None else (True, kinds[entry.get("base")] == 1, _order(_date(entry)))

        self._storage.write(self._prefix + min(PREVIOUS, key=worth), data)

    def _next_date(self) -> str:
        """Return the current time, or later, so that it follows every other date."""
        now, last = self._now(), max((_order(version.created) for version in self.all_versions()), default="")
        if last and (after := datetime.fromisoformat(last) + timedelta(milliseconds=1)) > now:
            now = after
        return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def _read(self, name: str) -> bytes | None:
        return self._storage.read(self._prefix + name)

    def _metadata(self, name: str) -> dict[str, str] | None:
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
    entries = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    load(data)
    return dict(entries)


def _date(metadata: dict[str, str]) -> str:
    return metadata.get("at") or UNDATED


def _is_older(previous: dict[str, str], current: dict[str, str]) -> bool:
    """Compare by date; without dates, as in stores of older versions, the previous adapter is the older."""
    return _order(_date(previous)) < _order(_date(current)) or not ("at" in previous or "at" in current)


def _order(date: str) -> str:
    """Return a sort key: dates share one time zone and precision, and a missing date sorts first."""
    return "" if date == UNDATED else date
