"""T5's tokenizer from a SentencePiece model (as in PixArt-Σ and older pipelines), without the SentencePiece library.

The file is a protocol buffer with few fields (sentencepiece_model.proto, Kudo & Richardson, 2018, arXiv:1808.06226):
pieces with their scores, and a normalizer as a table that the tokenizers library reads directly.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import AntherError

FILE = "spiece.model"

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of the model
_UNIGRAM = 1  # trainer's model_type
_NORMAL, _UNKNOWN = 1, 2  # kinds of pieces
_T5_UNKNOWN = 2  # place of the unknown piece, fixed in that class


class Model(NamedTuple):
    """Contents of a SentencePiece file."""

    pieces: list[tuple[str, float]]  # and the logarithm of each one's probability
    unknown: int  # its place among them
    normalizer: bytes  # compiled table of characters


def read(file: Path) -> Model:
    """Read a SentencePiece unigram model.

    Raises:
        AntherError: the file is damaged, or the model is of another type.
    """
    pieces, kinds, normalizer, model_type = [], [], b"", _UNIGRAM
    try:
        for field, value in _fields(file.read_bytes()):
            if field == _PIECES:
                piece = dict(_fields(value))
                pieces.append((bytes(piece[1]).decode(), struct.unpack("<f", piece.get(2, b"\0" * 4))[0]))
                kinds.append(piece.get(3, _NORMAL))
            elif field == _TRAINER:
                model_type = dict(_fields(value)).get(3, _UNIGRAM)
            elif field == _NORMALIZER:
                normalizer = bytes(dict(_fields(value)).get(2, b""))
    except (OSError, KeyError, IndexError, TypeError, ValueError, struct.error) as error:
        raise AntherError(f"{file}: no SentencePiece model ({' '.join(str(error).split())}): copy it again") from error
    if model_type != _UNIGRAM or _UNKNOWN not in kinds:
        raise AntherError(f"{file}: not a unigram model, as T5's is: give its tokenizer.json")
    return Model(pieces, kinds.index(_UNKNOWN), normalizer)


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protocol buffer in order: varints as int, the others as bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield field, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if place + length > len(data):
            raise ValueError("it ends in the middle")
        yield field, data[place : place + length]
        place += length


def _varint(data: Any, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number too long")


def t5_tokenizer(folder: Path) -> Any:
    """Make T5's tokenizer from `spiece.model` and the other files of its folder."""
    from transformers import T5Tokenizer  # slow import, so only here

    model, told = read(folder / FILE), _told(folder)
    sentinels = told.get("extra_ids", 100)
    if not isinstance(sentinels, int) or not 0 <= sentinels <= 1000:
        raise AntherError(f"{folder / 'tokenizer_config.json'}: extra_ids={sentinels}: must be 0 to 1000")
    if model.unknown != _T5_UNKNOWN:
        raise AntherError(f"{folder / FILE}: its unknown piece is at {model.unknown}, T5's at {_T5_UNKNOWN}")
    vocabulary = [*model.pieces, *((f"<extra_id_{place}>", 0.0) for place in reversed(range(sentinels)))]
    longest = told.get("model_max_length")
    try:
        found = T5Tokenizer(
            vocab=vocabulary,
            _spm_precompiled_charsmap=model.normalizer or None,
            extra_ids=sentinels,
            **({} if longest is None else {"model_max_length": longest}),
        )
    except Exception as error:  # the library may raise anything for invalid pieces
        raise AntherError(f"{folder / FILE}: no tokenizer of T5 ({' '.join(str(error).split())[:200]})") from error
    if model.unknown != found.unk_token_id:
        raise AntherError(
            f"{folder / FILE}: its unknown piece is the {model.unknown}th, T5's the {found.unk_token_id}th"
        )
    return found


def _told(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise AntherError(f"{folder / 'tokenizer_config.json'}: can't be read ({error})") from error
    return found if isinstance(found, dict) else {}
