"""Build T5's tokenizer from a SentencePiece model without the SentencePiece library.

PixArt-Σ and older pipelines contain such a model. The file is a protocol buffer with few fields
(sentencepiece_model.proto, Kudo & Richardson, 2018, arXiv:1808.06226): pieces with their scores, and a normalizer as a
table that the tokenizers library reads directly.
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
_NORMAL, _UNKNOWN = 1, 2  # types of pieces
_T5_UNKNOWN = 2  # index of the unknown piece, fixed in transformers' class


class SentencePieceModel(NamedTuple):
    """Contents of a SentencePiece file."""

    pieces: list[tuple[str, float]]  # with log probabilities
    unknown: int  # index of the unknown piece
    normalizer: bytes  # compiled table of characters


def read(file: Path) -> SentencePieceModel:
    """Read a SentencePiece unigram model.

    Raises:
        AntherError: the file is damaged, or the model is of another type.
    """
    pieces, types, normalizer, model_type = [], [], b"", _UNIGRAM
    try:
        for field, value in _fields(file.read_bytes()):
            if field == _PIECES:
                piece = dict(_fields(value))
                pieces.append((bytes(piece[1]).decode(), struct.unpack("<f", piece.get(2, b"\0" * 4))[0]))
                types.append(piece.get(3, _NORMAL))
            elif field == _TRAINER:
                model_type = dict(_fields(value)).get(3, _UNIGRAM)
            elif field == _NORMALIZER:
                normalizer = bytes(dict(_fields(value)).get(2, b""))
    except (OSError, KeyError, IndexError, TypeError, ValueError, struct.error) as error:
        raise AntherError(
            f"{file}: not a SentencePiece model ({' '.join(str(error).split())}): copy it again"
        ) from error
    if model_type != _UNIGRAM or _UNKNOWN not in types:
        raise AntherError(f"{file}: not a unigram model like T5's: give its tokenizer.json")
    return SentencePieceModel(pieces, types.index(_UNKNOWN), normalizer)


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protocol buffer in order: varints as int, the others as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield field, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if position + length > len(data):
            raise ValueError("truncated")
        yield field, data[position : position + length]
        position += length


def _varint(data: Any, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("number too long")


def t5_tokenizer(folder: Path) -> Any:
    """Build T5's tokenizer from `spiece.model` and the other files of its folder."""
    from transformers import T5Tokenizer  # slow import, so only here

    model, config = read(folder / FILE), _config(folder)
    sentinels = config.get("extra_ids", 100)
    if not isinstance(sentinels, int) or not 0 <= sentinels <= 1000:
        raise AntherError(f"{folder / 'tokenizer_config.json'}: extra_ids={sentinels}: must be 0 to 1000")
    if model.unknown != _T5_UNKNOWN:
        raise AntherError(f"{folder / FILE}: its unknown piece is at {model.unknown}, T5's at {_T5_UNKNOWN}")
    vocabulary = [*model.pieces, *((f"<extra_id_{i}>", 0.0) for i in reversed(range(sentinels)))]
    longest = config.get("model_max_length")
    try:
        tokenizer = T5Tokenizer(
            vocab=vocabulary,
            _spm_precompiled_charsmap=model.normalizer or None,
            extra_ids=sentinels,
            **({} if longest is None else {"model_max_length": longest}),
        )
    except Exception as error:  # the library may raise anything for invalid pieces
        raise AntherError(f"{folder / FILE}: no T5 tokenizer ({' '.join(str(error).split())[:200]})") from error
    if model.unknown != tokenizer.unk_token_id:
        raise AntherError(f"{folder / FILE}: its unknown piece is at {model.unknown}, T5's at {tokenizer.unk_token_id}")
    return tokenizer


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise AntherError(f"{folder / 'tokenizer_config.json'}: can't be read ({error})") from error
    return config if isinstance(config, dict) else {}
