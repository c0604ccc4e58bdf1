"""No tracked file contains a picture of the private data; copies of a picture are found in every container."""

from __future__ import annotations

import base64
import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tools.private_pictures import (
    DIGEST,
    LIST,
    ROOT,
    data_digests,
    digests,
    find_private,
    main,
    read_list,
    tracked_files,
)

DATA = ROOT.parent / "shared" / "data"
LETTER = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))


def png(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


ORIGINAL = png(LETTER)
PRIVATE = frozenset(digests(ORIGINAL))


def sheet(left: int = 64) -> bytes:
    picture = Image.new("L", (200, 150), 255)
    picture.paste(LETTER, (left, 64))
    return png(picture)


def table() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"], "image": [{"bytes": png(LETTER, compress_level=1), "path": None}]}), file)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        entry = tarfile.TarInfo("folder/letter.png")
        entry.size = len(ORIGINAL)
        tar.addfile(entry, io.BytesIO(ORIGINAL))
    return file.getvalue()


def page() -> bytes:
    return b'<p><img src="data:image/png;base64,' + base64.b64encode(ORIGINAL) + b'"></p>'


@pytest.mark.integration
def test_no_tracked_file_is_private() -> None:
    private = read_list(LIST)
    assert len(private) > 40_000
    assert LIST.stat().st_size == DIGEST * len(private) < 400_000
    assert find_private(tracked_files(), private) == []


@pytest.mark.parametrize(
    "copy",
    [
        lambda: ORIGINAL,
        lambda: png(LETTER, compress_level=0),
        lambda: png(LETTER.convert("RGB")),
        sheet,
        table,
        archive,
        page,
        lambda: gzip.compress(page()),
    ],
    ids=["same bytes", "encoded again", "in color", "cell of a sheet", "table", "archive", "page", "compressed"],
)
def test_planted_copy_is_found(copy: Callable[[], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted, harmless, listed = tmp_path / "planted", tmp_path / "harmless", tmp_path / "list"
    planted.write_bytes(copy())
    harmless.write_bytes(sheet(left=63))  # cells of a grid only
    listed.write_bytes(b"".join(PRIVATE))
    assert main([str(listed), str(planted), str(harmless)]) == 1
    assert capsys.readouterr().out == f"{planted}: contains a picture of the private data: remove it\n"
    assert main([str(listed), str(harmless)]) == 0


@pytest.mark.integration
@pytest.mark.skipif(not (DATA / "hands.parquet").is_file(), reason="without the data")
def test_list_is_that_of_the_data(tmp_path: Path) -> None:
    assert data_digests(DATA) == read_list(LIST)
    photo, again = next((DATA / "photos").rglob("*.jpg")), tmp_path / "again.png"
    Image.open(photo).save(again)
    assert find_private([photo, again], read_list(LIST)) == [photo, again]
