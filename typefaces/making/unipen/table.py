"""The Parquet file: one row per picture, in the image convention of Hugging Face `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from typefaces.dataset import GLYPHS, caption
from typefaces.making.render import png
from typefaces.making.unipen import layout, render
from typefaces.making.unipen.roles import assign_pseudonyms, assign_roles
from typefaces.making.unipen.strokes import WrittenGlyph, by_person, cleanest, usual_shapes

SAMPLES = 2  # largest number of pictures per person and character
COLUMNS = {
    "person": pa.string(),
    "donor": pa.string(),
    "role": pa.string(),
    "glyph": pa.string(),
    "sample": pa.int64(),
    "text": pa.string(),
    "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
}
FEATURES = {
    name: {"_type": "Image"} if name == "image" else {"dtype": str(kind), "_type": "Value"}
    for name, kind in COLUMNS.items()
}
METADATA = {
    "huggingface": json.dumps({"info": {"features": FEATURES}}),  # `datasets` decodes the column image by this
    "anther.people.version": "1",  # change it when the selection or the rendering changes
    "anther.people.source": "UNIPEN train_r01_v07, International Unipen Foundation, doi:10.5281/zenodo.1195803",
}
SCHEMA = pa.schema(list(COLUMNS.items())).with_metadata(METADATA)


def rows(glyphs: Iterable[WrittenGlyph]) -> Iterator[dict[str, Any]]:
    """Select, place and draw characters.

    Args:
        glyphs: all characters of all people; the usual size of each glyph is that over everyone here.

    Yields:
        Rows by person, character and sample, for people with enough characters.
    """
    people = by_person(glyphs)
    usual = usual_shapes(people.values())
    hands = {person: cleanest(hand, usual) for person, hand in people.items()}
    pseudonyms = assign_pseudonyms(people)
    roles = assign_roles({person: len(hand) for person, hand in hands.items()})
    for person in sorted(roles, key=pseudonyms.__getitem__):
        placed = layout.place(hands[person])
        for glyph in sorted(placed, key=GLYPHS.index):
            for sample, strokes in enumerate(placed[glyph][:SAMPLES]):
                picture = png(render.draw(strokes, layout.PEN))
                yield {
                    "person": pseudonyms[person],
                    "donor": person.split("/")[0],
                    "role": roles[person],
                    "glyph": glyph,
                    "sample": sample,
                    "text": caption(glyph),
                    "image": {"bytes": picture, "path": None},
                }


def encode(table: list[dict[str, Any]]) -> bytes:
    """Return the content of a Parquet file with these rows; equal rows give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue().to_pybytes()
