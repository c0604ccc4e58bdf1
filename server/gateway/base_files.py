"""HTTP routes that serve bases to the devices of the federation; `server.gateway` authenticates the devices.

    GET /v1/anther/base/<hash>/manifest     chunk manifest, as JSON
    GET /v1/anther/base/<hash>/file/<n>     n-th file of the base, or a part of it with `Range`

Values from a request are looked up in tables made at the start of the server; they never become a path.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from models.files import chunk_manifest
from models.files.chunk_manifest import ChunkManifest

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

MANIFEST_PATH = "/v1/anther/base/{base}/manifest"
FILE_PATH = "/v1/anther/base/{base}/file/{number}"


class BaseFiles:
    """Files of bases by content hash. The constructor reads all files once; devices reject files that change later.

    Args:
        folders: folders of bases, from `models.files.assets.locate`.

    Raises:
        AntherError: a base can't be read or distributed.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._manifests: dict[str, bytes] = {}
        self._files: dict[tuple[str, str], Path] = {}
        for folder in folders:
            self._add(folder, chunk_manifest.build(folder))

    @property
    def bases(self) -> tuple[str, ...]:
        """Content hashes of the bases."""
        return tuple(self._manifests)

    def manifest(self, base: str) -> bytes | None:
        """Return the manifest of the base with this hash; None if there is none."""
        return self._manifests.get(base)

    def file(self, base: str, number: str) -> Path | None:
        """Return the path of the file with this number; None if there is none."""
        return self._files.get((base, number))

    def _add(self, folder: Path, manifest: ChunkManifest) -> None:
        self._manifests[manifest.base] = manifest.encode()
        for number, file in enumerate(manifest.files):
            self._files[manifest.base, str(number)] = (folder / file.name).resolve()


def routes(base_files: BaseFiles) -> list[Route]:
    """Make Starlette's routes for these bases; they don't authenticate."""
    from starlette.responses import FileResponse, PlainTextResponse  # not installed on every device
    from starlette.responses import Response as Plain
    from starlette.routing import Route

    async def manifest(request: Request) -> Response:
        content = base_files.manifest(request.path_params["base"])
        if content is None:
            return PlainTextResponse("no such base", 404)
        return Plain(content, media_type="application/json")

    async def file(request: Request) -> Response:
        path = base_files.file(request.path_params["base"], request.path_params["number"])
        if path is None:
            return PlainTextResponse("no such file", 404)
        if not path.is_file():
            return PlainTextResponse("this file is gone from the server", 410)
        if "," in "".join(request.headers.getlist("range")):  # thousands of ranges would cost seconds per request
            return PlainTextResponse("one range at a time", 416)
        return FileResponse(path, media_type="application/octet-stream")

    return [Route(MANIFEST_PATH, manifest, methods=["GET"]), Route(FILE_PATH, file, methods=["GET"])]
