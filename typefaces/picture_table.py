"""Parquet files of people's pictures, in the image convention of Hugging Face `datasets`.

A row is one picture: a column with the person, `text` with the caption, `image`, a struct with the `bytes` or the
`path` of a file, and optionally `role` and `split`. The column `image` is read last, for the wanted rows only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import AntherError, os_error, shorten, summary

PERSON, TEXT, IMAGE, ROLE, SPLIT = "person", "text", "image", "role", "split"
_OTHERS = (TEXT, ROLE, SPLIT)
_BATCH = 256  # pictures in memory while a file is searched


@dataclass(frozen=True, slots=True)
class PictureRow:
    """One picture of a file, without its pixels."""

    file: Path
    number: int
    """Row of the file, from 0."""
    person: str
    text: str | None
    role: str | None
    split: str | None

    def __str__(self) -> str:
        return f"{self.file}, row {self.number} ({shorten(self.person)})"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image as it is stored: the bytes of a file, or else its path."""

    data: bytes | None
    path: str | None


def read_rows(file: Path, *, person: str = PERSON, required: Sequence[str] = ()) -> list[PictureRow]:
    """Read all columns but `image`, in the order of the file.

    Args:
        file: the Parquet file.
        person: column with the person.
        required: optional columns that this file must have.

    Raises:
        AntherError: the file can't be read, a column is missing or of another type, or a row names no person.
    """
    with _open(file) as parquet:
        _check_columns(file, parquet.schema_arrow, person, required)
        present = [name for name in _OTHERS if name in parquet.schema_arrow.names]
        columns = _read_columns(file, parquet, [person, *present])
    same: dict[Any, Any] = {}  # equal names and captions share one string
    absent = [None] * len(columns[person])
    values = (map(same.setdefault, column, column) for column in (columns.get(name, absent) for name in _OTHERS))
    return [
        PictureRow(file, number, same.setdefault(name := _person(file, number, value, person), name), *others)
        for number, (value, *others) in enumerate(zip(columns[person], *values, strict=True))
    ]


def read_images(rows: Iterable[PictureRow]) -> Iterator[tuple[PictureRow, StoredImage]]:
    """Yield rows with their images, in the order of each file; row groups without a wanted row are skipped.

    Raises:
        AntherError: a file can't be read, or a row has no image.
    """
    wanted: dict[Path, dict[int, PictureRow]] = {}
    for row in rows:
        wanted.setdefault(row.file, {})[row.number] = row
    for file, by_number in wanted.items():
        with _open(file) as parquet:
            try:
                for number, value in _images(parquet, by_number.keys()):
                    yield by_number[number], _stored(by_number[number], value)
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(file, error) from error


def _open(file: Path) -> pq.ParquetFile:  # read_table imports pyarrow.compute, which takes half a second
    try:
        return pq.ParquetFile(file)
    except FileNotFoundError as error:
        raise AntherError(f"{file}: no such file") from error
    except pa.ArrowException as error:
        raise _unreadable(file, error) from error
    except OSError as error:
        raise os_error(error, file) from error


def _unreadable(file: Path, error: Exception) -> AntherError:
    return AntherError(f"{file}: can't be read as Parquet ({summary(error)}); write it again")


def _check_columns(file: Path, schema: pa.Schema, person: str, required: Sequence[str]) -> None:
    for name in (person, TEXT, IMAGE, *required):
        if name not in schema.names:
            raise AntherError(f"{file}: no column {name}; its columns are {', '.join(schema.names)}")
    kind = schema.field(IMAGE).type
    if not pa.types.is_struct(kind) or not {"bytes", "path"} & {kind.field(i).name for i in range(kind.num_fields)}:
        raise AntherError(f"{file}: the column {IMAGE} is {kind}; it must be a struct with bytes or path")
    for name in _OTHERS:
        if name in schema.names and not _is_text(kind := schema.field(name).type):
            raise AntherError(f"{file}: the column {name} is {kind}; it must be text")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _read_columns(file: Path, parquet: pq.ParquetFile, names: Sequence[str]) -> dict[str, list[Any]]:
    try:
        table = parquet.read(columns=list(names))
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error
    return {name: table.column(name).to_pylist() for name in names}


def _person(file: Path, number: int, value: object, column: str) -> str:
    """Return the name of a person, who may have a number for a name."""
    name = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not name:
        raise AntherError(f"{file}, row {number}: {column}={shorten(value)} is no person; write a name or a number")
    return name


def _images(parquet: pq.ParquetFile, wanted: Iterable[int]) -> Iterator[tuple[int, Any]]:
    numbers, first = set(wanted), 0
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        if numbers.isdisjoint(range(first, first + size)):
            first += size
            continue
        for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=[IMAGE]):
            column = batch.column(IMAGE)
            yield from ((first + i, column[i].as_py()) for i in range(len(column)) if first + i in numbers)
            first += len(column)


def _stored(row: PictureRow, value: Any) -> StoredImage:
    image = StoredImage(value.get("bytes"), value.get("path")) if value else StoredImage(None, None)
    if not image.data and not image.path:
        raise AntherError(f"{row}: has no picture; the column {IMAGE} needs the bytes or the path of one")
    return image
