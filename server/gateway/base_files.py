"""The bases that a server hands to the devices of its federation: routes for `server.gateway`, which knows who asks.

    GET /v1/anther/base/<hash>/manifest     models.base.chunk_manifest, as JSON
    GET /v1/anther/base/<hash>/file/<n>     the n-th file of it, or by `Range` a part

What a client says is looked up in tables of what the server was started with, and never becomes a path.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from models.base import chunk_manifest
from models.base.chunk_manifest import ChunkManifest

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

MANIFEST_PATH = "/v1/anther/base/{base}/manifest"
FILE_PATH = "/v1/anther/base/{base}/file/{number}"


class BaseFiles:
    """Bases by their content hashes. Making it reads all of them, once; what changes afterwards devices refuse.

    Args:
        folders: of bases, as `models.base.assets.locate` finds them.

    Raises:
        AntherError: one can't be read or handed on.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._manifests: dict[str, bytes] = {}
        self._files: dict[tuple[str, str], Path] = {}
        for folder in folders:
            self._add(folder, chunk_manifest.build(folder))

    @property
    def bases(self) -> tuple[str, ...]:
        """Content hashes of those that are here."""
        return tuple(self._manifests)

    def manifest(self, base: str) -> bytes | None:
        """The manifest of the base of this hash; None if it isn't here."""
        return self._manifests.get(base)

    def file(self, base: str, number: str) -> Path | None:
        """The file of this number, as it was asked for; None if there is none."""
        return self._files.get((base, number))

    def _add(self, folder: Path, manifest: ChunkManifest) -> None:
        self._manifests[manifest.base] = manifest.encode()
        for number, file in enumerate(manifest.files):
            self._files[manifest.base, str(number)] = (folder / file.name).resolve()


def routes(shelf: BaseFiles) -> list[Route]:
    """Starlette's routes for what is on the shelf; they ask nobody who they are."""
    from starlette.responses import FileResponse, PlainTextResponse  # not on a device that only learns
    from starlette.responses import Response as Plain
    from starlette.routing import Route

    async def manifest(request: Request) -> Response:
        found = shelf.manifest(request.path_params["base"])
        if found is None:
            return PlainTextResponse("no such base here", 404)
        return Plain(found, media_type="application/json")

    async def file(request: Request) -> Response:
        found = shelf.file(request.path_params["base"], request.path_params["number"])
        if found is None:
            return PlainTextResponse("no such file here", 404)
        if not found.is_file():
            return PlainTextResponse("this file is gone from the server", 410)
        if "," in "".join(request.headers.getlist("range")):  # thousands of them cost seconds each
            return PlainTextResponse("one range at a time", 416)
        return FileResponse(found, media_type="application/octet-stream")

    return [Route(MANIFEST_PATH, manifest, methods=["GET"]), Route(FILE_PATH, file, methods=["GET"])]
