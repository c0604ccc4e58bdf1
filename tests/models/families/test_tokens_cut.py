"""Tokens of long captions that no text encoder reads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from models.families.encoders import tokens_cut


def tokenizer(longest: int) -> object:
    """Return a tokenizer of words, with a token at each end."""

    class Words:
        model_max_length = longest

        def __call__(self, caption: str) -> object:
            return SimpleNamespace(input_ids=["<", *caption.split(), ">"])

    return Words()


@pytest.mark.parametrize(
    ("limits", "words", "cut"),
    [([77], 75, 0), ([77], 76, 1), ([77], 100, 25), ([77, 512], 100, 0), ([77, 128], 200, 74)],
)
def test_tokens_beyond_all_encoders_are_cut(limits: list[int], words: int, cut: int) -> None:
    assert tokens_cut([tokenizer(limit) for limit in limits], "word " * words) == cut
