"""Rebuild the data set: `python -m typefaces.making --cache ~/.cache/anther-fonts` (Debian 12, about 5 GB of disk)."""

from __future__ import annotations

import argparse
import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import features

from typefaces.dataset import FILE, GLYPHS
from typefaces.making import designs, packages, render, table
from typefaces.making.order import order

SCHEMA = pa.schema(
    [(key, pa.string()) for key in ("name", "role", "kind", "designer", "package", "licence", "design")]
    + [("order", pa.list_(pa.uint8())), ("glyphs", pa.list_(pa.binary()))]
)
VERSION, DATE = "1", "2026-11-23"  # change both when the table or the rendering changes


def main() -> None:
    parser = argparse.ArgumentParser(prog="typefaces.making", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder for packages, outside the repository")
    parser.add_argument("--output", type=Path, default=FILE, help="the Parquet file (default: %(default)s)")
    arguments = parser.parse_args()
    entries = table.read()
    versions = packages.unpack((entry.package for entry in entries), arguments.cache)
    with ProcessPoolExecutor() as pool:
        families = list(pool.map(pictures, entries, [arguments.cache] * len(entries), chunksize=4))
    names, roles, _, _, _, _, ids, *_ = zip(*entries, strict=True)
    if pairs := designs.leaks(names, roles, ids, families):
        raise SystemExit("one design in two roles:\n  " + "\n  ".join(pairs))
    rows = [row(entry, images) for entry, images in zip(entries, families, strict=True)]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write(rows, versions, arguments.output)
    print(f"{len(rows)} families, {arguments.output.stat().st_size / 1e6:.2f} MB: {arguments.output}")


def pictures(entry: table.CatalogEntry, cache: Path) -> NDArray[np.uint8]:
    """Render the 62 images of a family."""
    return render.family(cache / entry.package / entry.font, entry.face, GLYPHS)


def row(entry: table.CatalogEntry, images: NDArray[np.uint8]) -> dict[str, object]:
    """Build a row of the file."""
    fields = {key: value for key, value in entry._asdict().items() if key not in ("font", "face")}
    return fields | {"order": order(entry.name), "glyphs": [render.png(image) for image in images]}


def write(rows: list[dict[str, object]], versions: dict[str, str], path: Path) -> None:
    """Write rows in the table's order; metadata records their sources, so that equal sources give equal files.

    Args:
        rows: one per family.
        versions: Debian version by package.
        path: path of the Parquet file.
    """
    metadata = {
        "anther.typefaces.version": VERSION,
        "anther.typefaces.date": DATE,
        "anther.typefaces.families": str(len(rows)),
        "anther.typefaces.glyphs": GLYPHS,
        "anther.typefaces.table_sha256": hashlib.sha256(table.FILE.read_bytes()).hexdigest(),
        "anther.typefaces.renderer": f"Pillow {PIL.__version__}, FreeType {features.version('freetype2')}",
        "anther.typefaces.packages": json.dumps(versions, sort_keys=True),
    }
    data = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))
    pq.write_table(data, path, compression="zstd", compression_level=19, row_group_size=64, use_dictionary=False)


if __name__ == "__main__":
    main()
