"""Load text encoders and tokenizers of a pipeline's folder, and verify that each is complete.

If a file lacks weights, transformers initializes them at random. If a folder has no vocabulary, it creates an empty
tokenizer. In both cases no error is raised, and all captions are encoded alike with the empty tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import AntherError, shorten
from models.families import sentencepiece
from models.files import loading

TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "Gemma2Model")
TOKENIZERS = tuple(f"{kind}Tokenizer{end}" for kind in ("CLIP", "T5", "Gemma") for end in ("", "Fast"))

_MARKS = re.compile(r"▁|Ġ|</w>|\s")  # beginning or end of a word
_SENTINEL = re.compile(r"<extra_id_\d+>")
_LONGEST = 10**6  # tokens; a tokenizer without a configured maximum reports 10³⁰
_T5_LONGEST = 512


def load(folder: Path, names: tuple[str, ...], classes: Mapping[str, str], *, empty: bool = False) -> dict[str, Any]:
    """Load the text encoders and tokenizers in these subfolders.

    Args:
        folder: the pipeline's folder.
        names: subfolders.
        classes: class in transformers by subfolder.
        empty: leave the encoders' weights in their files, and only verify that all are present.

    Returns:
        Encoders and tokenizers by subfolder.

    Raises:
        AntherError: a part is of another class, damaged or incomplete, or encoder and tokenizer don't match.
    """
    import transformers  # slow import, so only here

    loaded: dict[str, Any] = {}
    for name in names:
        supported = TOKENIZERS if name.startswith("tokenizer") else TEXT_ENCODERS
        if classes[name] not in supported:
            raise AntherError(
                f"base {folder}: its {name} is a {shorten(classes[name])}: only {', '.join(supported)} are supported"
            )
        kind = getattr(transformers, classes[name])
        if supported is TOKENIZERS:
            loaded[name] = _tokenizer(kind, folder / name)
        else:
            loaded[name] = loading.load_text_encoder(kind, folder / name, empty=empty)
    for name, encoder in loaded.items():
        if name.startswith("text_encoder"):
            _match(loaded[name.replace("text_encoder", "tokenizer")], encoder, folder / name)
    return loaded


def _tokenizer(kind: Any, folder: Path) -> Any:
    if (folder / sentencepiece.FILE).is_file() and not (folder / "tokenizer.json").is_file() and "T5" in kind.__name__:
        tokenizer = sentencepiece.t5_tokenizer(folder)
    else:
        tokenizer = loading.from_pretrained(kind, folder, dtype=None, use_safetensors=None)
    special = set(tokenizer.all_special_tokens)
    words = {_MARKS.sub("", token) for token in tokenizer.get_vocab() if not _SENTINEL.fullmatch(token)}
    words -= special | {""}
    if len(words) < 2:  # a single word can't distinguish two captions
        raise AntherError(
            f"{folder}: has no vocabulary (tokenizer.json, or vocab.json and merges.txt, or {sentencepiece.FILE}): "
            "copy it again"
        )
    return tokenizer


def _match(tokenizer: Any, encoder: Any, folder: Path) -> None:
    """Limit a tokenizer to its text encoder's positions, and refuse tokens that the encoder doesn't know."""
    size, largest = encoder.config.vocab_size, max(tokenizer.get_vocab().values())
    if largest >= size:
        raise AntherError(
            f"{folder}: knows {size} tokens and its tokenizer {largest + 1}: they are of different models, copy both"
        )
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float) or not longest >= 1:
        raise AntherError(f"{folder}: its tokenizer's model_max_length={shorten(longest)}: must be over 0")
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is not None:
        tokenizer.model_max_length = int(min(longest, positions))
    elif longest > _LONGEST:
        tokenizer.model_max_length = _T5_LONGEST


def tokens_cut(tokenizers: Sequence[Any], caption: str) -> int:
    """Count the tokens of a caption beyond the longest sequence that one of its text encoders takes."""
    with loading.quiet_libraries():  # they warn about long sequences
        return max(0, min(len(each(caption).input_ids) - each.model_max_length for each in tokenizers))
