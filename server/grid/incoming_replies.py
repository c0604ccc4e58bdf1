"""Incoming replies, from the arrival of their heads until all of their objects have arrived."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping

import httpx
from flwr.app import Message

from server.grid.runtime_grid import ReplyHead, RuntimeGrid, unpack


class IncomingReplies:
    """Heads of replies whose objects have not all arrived.

    No part of a reply is kept in memory before the reply is complete. Otherwise a device could occupy memory
    indefinitely by withholding one object.

    Args:
        max_objects: maximum number of objects in a reply.
    """

    def __init__(self, grid: RuntimeGrid, *, max_objects: int) -> None:
        self._grid, self._max_objects = grid, max_objects
        self._heads: dict[str, ReplyHead] = {}  # by the id of the message that each answers

    def poll_heads(self, identifiers: Collection[str]) -> Mapping[str, Exception]:
        """Ask for the heads of replies to these messages, and return the errors by message id.

        Raises:
            httpx.TransportError: the SuperLink doesn't answer, which is not a device's fault.
        """
        unknown = [name for name in identifiers if name not in self._heads]
        if not unknown:
            return {}
        try:
            self._add_heads(self._grid.heads(unknown, max_objects=self._max_objects), unknown)
        except httpx.TransportError:
            raise
        except Exception:  # one invalid reply fails the whole call: ask for each separately
            return self._poll_separately(unknown)
        return {}

    def with_head(self, identifiers: Iterable[str]) -> list[str]:
        """Return the messages for which the head of a reply has arrived, fewest objects first."""
        return sorted((name for name in identifiers if name in self._heads), key=lambda name: len(self._objects(name)))

    def pull(self, identifier: str) -> Message | None:
        """Return the reply to a message whose head has arrived; None if it is incomplete.

        Raises:
            httpx.TransportError: as for `poll_heads`.
            Exception: the reply can't be fetched or unpacked, and is dropped.
        """
        head = self._heads[identifier]
        try:
            if len(head.objects) > self._max_objects:
                raise ValueError(f"it has more than {self._max_objects} objects")
            contents: dict[str, bytes] = {}
            for name in head.objects:
                content = self._grid.object(name)
                if content is None:  # the next pull starts with this object: one call while it is missing
                    others = (other for other in head.objects if other != name)
                    self._heads[identifier] = head._replace(objects=(name, *others))
                    return None
                contents[name] = content
            message = unpack(head, contents)
        except httpx.TransportError:
            raise
        except Exception:
            self.drop([identifier])
            raise
        self.drop([identifier])
        return message

    def drop(self, identifiers: Iterable[str]) -> None:
        """Drop these replies, and make the SuperLink delete their objects."""
        for name in identifiers:
            if head := self._heads.pop(name, None):
                with contextlib.suppress(Exception):  # on failure, it stays on the SuperLink's disk until it expires
                    self._grid.confirm(head.reply)

    def _objects(self, name: str) -> tuple[str, ...]:
        return self._heads[name].objects

    def _poll_separately(self, identifiers: Iterable[str]) -> dict[str, Exception]:
        errors: dict[str, Exception] = {}
        for name in identifiers:
            try:
                self._add_heads(self._grid.heads([name], max_objects=self._max_objects), [name])
            except httpx.TransportError:
                raise
            except Exception as error:
                errors[name] = error
        return errors

    def _add_heads(self, heads: Iterable[ReplyHead], identifiers: Collection[str]) -> None:
        self._heads |= {head.request: head for head in heads if head.request in identifiers}
