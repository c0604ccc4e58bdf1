"""Pictures in memory as bytes of a file: decoded as a picture on disk, and known by their content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.data import StoredPicture, fingerprint
from common.errors import AntherError
from simulations.fleet.encoded_picture import EncodedPicture
from tests.helpers.people import png

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)


def test_same_as_the_picture_on_disk(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(PIXELS))
    stored, encoded = StoredPicture(tmp_path / "a.png", "a cat"), EncodedPicture("row 0", png(PIXELS), "a cat")
    assert (encoded.pixels == PIXELS).all()
    assert (encoded.at_least(8) == stored.at_least(8)).all()
    assert fingerprint([encoded]) == fingerprint([stored])


def test_content_is_its_identity() -> None:
    one = EncodedPicture("row 0", png(PIXELS), "a cat")
    assert fingerprint([one]) == fingerprint([EncodedPicture("row 5", png(PIXELS), "a cat")])
    others = [
        EncodedPicture("row 0", png(PIXELS), "a dog"),
        EncodedPicture("row 0", png(255 - PIXELS), "a cat"),
        EncodedPicture("row 0", png(PIXELS), "a cat", background="black"),
    ]
    assert len({fingerprint([picture]) for picture in (one, *others)}) == 4


def test_damage_is_reported_with_its_source() -> None:
    picture = EncodedPicture("people.parquet, row 7 (ann)", b"no picture", "a cat")
    with pytest.raises(AntherError, match=r"people\.parquet, row 7 \(ann\): can't be read as a picture"):
        _ = picture.pixels
