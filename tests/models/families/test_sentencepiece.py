"""Compare T5's tokenizer from a SentencePiece file with results of sentencepiece 0.2.1 for the same bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from common.errors import AntherError
from models.families import sentencepiece

PIECES = [
    ("<pad>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("<unk>", 0.0, 2),
    ("▁", -2.0, 1),
    ("▁the", -2.2, 1),
    ("▁a", -2.1, 1),
    ("cat", -3.0, 1),
    ("c", -4.0, 1),
    ("a", -3.9, 1),
    ("t", -4.1, 1),
    ("s", -3.5, 1),
    ("er", -3.2, 1),
    ("ser", -6.0, 1),
    ("v", -4.4, 1),
    ("▁server", -7.9, 1),
    ("e", -3.8, 1),
    ("r", -3.9, 1),
    (".", -3.0, 1),
    ("é", -5.0, 1),
    ("th", -3.7, 1),
]
ENCODED = {
    "the cat sat.": [4, 3, 6, 3, 10, 8, 9, 17, 1],
    "a server": [5, 14, 1],
    "servers": [14, 10, 1],
    "THE the  cat ": [3, 2, 4, 3, 6, 1],
    "": [1],
    "caté zz the": [3, 6, 18, 3, 2, 4, 1],
    "thethe a.a": [4, 19, 15, 5, 17, 8, 1],
}


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def block(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def model_bytes(pieces: list[tuple[str, float, int]], model_type: int = 1) -> bytes:
    """Serialize a SentencePiece file according to its .proto: pieces, trainer and normalizer specifications."""
    out = b""
    for piece, score, kind in pieces:
        text = block(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        out += block(1, text + (varint(3 << 3) + varint(kind) if kind != 1 else b""))
    ids = b"".join(varint(field << 3) + varint(value) for field, value in ((40, 2), (42, 1), (43, 0)))
    out += block(2, varint(3 << 3) + varint(model_type) + ids)
    return out + block(3, block(1, b"identity") + varint(3 << 3) + varint(1) + varint(4 << 3) + varint(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spiece.model").write_bytes(model_bytes(PIECES))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 2, "model_max_length": 300}))
    return tmp_path


def test_tokenization_matches_sentencepiece(folder: Path) -> None:
    tokenizer = sentencepiece.t5_tokenizer(folder)
    assert {caption: tokenizer(caption).input_ids for caption in ENCODED} == ENCODED
    assert tokenizer.model_max_length == 300
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids(["<extra_id_1>", "<extra_id_0>"]) == [len(PIECES), len(PIECES) + 1]
    padded = tokenizer("a server", padding="max_length", max_length=5, truncation=True)
    assert (padded.input_ids, padded.attention_mask) == ([5, 14, 1, 0, 0], [1, 1, 1, 0, 0])


def test_read(folder: Path) -> None:
    model = sentencepiece.read(folder / "spiece.model")
    assert [piece for piece, _ in model.pieces] == [piece for piece, *_ in PIECES]
    assert [score for _, score in model.pieces] == pytest.approx([score for _, score, _ in PIECES])
    assert (model.unknown, model.normalizer) == (2, b"")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n",
        b"\x0a",
        b"\xff" * 40,
        b"\x0a\x7fab",
        model_bytes(PIECES, model_type=2),
        model_bytes(PIECES)[:-7],
        model_bytes(PIECES[3:]),
        b"\x0a\x02\x0a\x05",
        model_bytes([*PIECES[:2], PIECES[3], PIECES[2], *PIECES[4:]]),
    ],
)
def test_damaged_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "spiece.model").write_bytes(content)
    with pytest.raises(AntherError, match=r"spiece\.model") as refusal:
        sentencepiece.t5_tokenizer(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"extra_ids": -1}', '{"extra_ids": "x"}', '{"extra_ids": 1e9}'])
def test_invalid_configuration_is_refused(folder: Path, text: str) -> None:
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(AntherError, match=r"tokenizer_config\.json"):
        sentencepiece.t5_tokenizer(folder)
