"""Replies on their way, from the moment that their heads are there until all of their objects are."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping

import httpx
from flwr.app import Message

from server.runtime_grid import Head, RuntimeGrid, unpacked


class Arrivals:
    """Heads of replies whose objects are not all there yet.

    Nothing of a reply is kept in memory before it is whole: a device that sends all of it but one object would else
    take memory for as long as it likes.

    Args:
        most: objects that a reply may consist of.
    """

    def __init__(self, grid: RuntimeGrid, *, most: int) -> None:
        self._grid, self._most = grid, most
        self._heads: dict[str, Head] = {}  # by the id of the message that each answers

    def look(self, identifiers: Collection[str]) -> Mapping[str, Exception]:
        """Ask for the heads of replies to these messages; what went wrong for which of them.

        Raises:
            httpx.TransportError: the SuperLink doesn't answer, which is no device's doing.
        """
        asked = [name for name in identifiers if name not in self._heads]
        if not asked:
            return {}
        try:
            self._keep(self._grid.heads(asked, most=self._most), asked)
        except httpx.TransportError:
            raise
        except Exception:  # one of them spoils it for the others: each by itself
            return self._one_by_one(asked)
        return {}

    def promised(self, identifiers: Iterable[str]) -> list[str]:
        """Those of these messages to which the head of a reply has come, fewest objects first."""
        return sorted((name for name in identifiers if name in self._heads), key=lambda name: len(self._objects(name)))

    def pull(self, identifier: str) -> Message | None:
        """The reply to a message whose head has come; None if it is not whole yet.

        Raises:
            httpx.TransportError: as for `look`.
            Exception: it can't be had, or can't be unpacked, and is dropped.
        """
        head = self._heads[identifier]
        try:
            if len(head.objects) > self._most:
                raise ValueError(f"it has more than {self._most} objects")
            contents: dict[str, bytes] = {}
            for name in head.objects:
                content = self._grid.object(name)
                if content is None:  # the next look begins with it, and costs one call while it is missing
                    rest = (other for other in head.objects if other != name)
                    self._heads[identifier] = head._replace(objects=(name, *rest))
                    return None
                contents[name] = content
            message = unpacked(head, contents)
        except httpx.TransportError:
            raise
        except Exception:
            self.drop([identifier])
            raise
        self.drop([identifier])
        return message

    def drop(self, identifiers: Iterable[str]) -> None:
        """Forget these replies, and have the SuperLink delete what is there of them."""
        for name in identifiers:
            if head := self._heads.pop(name, None):
                with contextlib.suppress(Exception):  # it stays on the SuperLink's disk until its time is over
                    self._grid.confirm(head.reply)

    def _objects(self, name: str) -> tuple[str, ...]:
        return self._heads[name].objects

    def _one_by_one(self, asked: Iterable[str]) -> dict[str, Exception]:
        wrong: dict[str, Exception] = {}
        for name in asked:
            try:
                self._keep(self._grid.heads([name], most=self._most), [name])
            except httpx.TransportError:
                raise
            except Exception as error:
                wrong[name] = error
        return wrong

    def _keep(self, heads: Iterable[Head], asked: Collection[str]) -> None:
        self._heads |= {head.request: head for head in heads if head.request in asked}
