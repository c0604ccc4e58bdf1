"""Find pictures of real people in files:  python -m tools.private_pictures LIST [FILE …]

Handwriting and photographs that experiments are measured on must not be committed. LIST has the first 8 bytes of the
SHA-256 of each such file and of its decoded pixels. A file is reported if one of its digests is listed: that of its
bytes, of its decoded picture, or of a 64 × 64 cell of a sheet. Pictures in archives, Parquet tables and data URLs are
examined too. Without FILE, all tracked files are examined. `--from DATA` writes LIST instead, from the folder of the
data: `hands.parquet` and `photos/`.

Copies that were scaled, cropped or compressed with loss are not found.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests" / "fixtures" / "private_pictures.bin"
DIGEST = 8  # bytes
CELL = 64  # side of a letter in pixels
_DATA_URL = re.compile(rb"data:image/[a-z+]+;base64,([A-Za-z0-9+/=]+)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a file contains a listed picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--from", dest="data", type=Path, metavar="DATA", help="write LIST from this folder")
    options = parser.parse_args(arguments)
    if options.data:
        options.list.write_bytes(b"".join(sorted(data_digests(options.data))))
        return 0
    found = find_private(options.files or tracked_files(), read_list(options.list))
    for file in found:
        print(f"{file}: contains a picture of the private data: remove it")
    return 1 if found else 0


def read_list(file: Path) -> frozenset[bytes]:
    """Return the digests of a list."""
    content = file.read_bytes()
    return frozenset(content[start : start + DIGEST] for start in range(0, len(content), DIGEST))


def tracked_files() -> list[Path]:
    """Return the files of the repository that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def find_private(files: Iterable[Path], private: Collection[bytes]) -> list[Path]:
    """Return the files that contain a picture of these digests."""
    return [file for file in files if any(digest in private for digest in digests(file.read_bytes()))]


def data_digests(data: Path) -> set[bytes]:
    """Return the digests of all pictures of the data, each of its bytes and of its pixels."""
    photos = [path.read_bytes() for path in (data / "photos").rglob("*") if path.is_file()]
    contents = [*_table_pictures((data / "hands.parquet").read_bytes()), *filter(_decoded, photos)]
    return {digest for content in contents for digest in (_digest(content), *_whole_picture(content))}


def digests(content: bytes) -> Iterator[bytes]:
    """Yield the digests of a file, and of the pictures and cells in it."""
    yield _digest(content)
    if picture := _decoded(content):
        yield _pixels(picture)
        for top in range(0, picture.height, CELL):
            for left in range(0, picture.width, CELL):
                yield _pixels(picture.crop((left, top, left + CELL, top + CELL)))
        return
    for part in _parts(content):
        yield from digests(part)


def _parts(content: bytes) -> Iterator[bytes]:
    """Yield the files in an archive, the pictures in a table, and those in data URLs of a text."""
    if content[:4] == b"PAR1":
        yield from _table_pictures(content)
    elif content[:2] == b"\x1f\x8b":
        with gzip.open(io.BytesIO(content)) as unzipped:
            plain = unzipped.read()
        if not tarfile.is_tarfile(io.BytesIO(plain)):
            yield plain
            return
        with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
            for member in archive:
                if file := archive.extractfile(member):
                    yield file.read()
    else:
        yield from (base64.b64decode(match[1]) for match in _DATA_URL.finditer(content))


def _table_pictures(content: bytes) -> Iterator[bytes]:
    """Yield all binary values of a Parquet table, in structs too."""
    for batch in pq.ParquetFile(io.BytesIO(content)).iter_batches():
        for column in pa.Table.from_batches([batch]).flatten().columns:
            if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
                yield from (value for value in column.to_pylist() if value)


def _decoded(content: bytes) -> Image.Image | None:
    """Return the picture as RGB, so that gray and color copies are equal; None if the content isn't a picture."""
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError):
        return None


def _whole_picture(content: bytes) -> Iterator[bytes]:
    if picture := _decoded(content):
        yield _pixels(picture)


def _pixels(picture: Image.Image) -> bytes:
    return _digest(f"{picture.width} {picture.height} ".encode() + picture.tobytes())


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:DIGEST]


if __name__ == "__main__":
    sys.exit(main())
