"""Networks from folders in diffusers' layout: from safetensors only, whole, never from the internet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.errors import AntherError


def from_folder(kind: Any, folder: Path) -> Any:
    """A network of this class in float32.

    Raises:
        AntherError: it is pickled, damaged or foreign. diffusers draws weights at random that a file lacks.
    """
    if not any(folder.glob("*.safetensors")):
        raise AntherError(f"{folder}: holds no safetensors, and pickled weights are never read: convert them")
    network, found = from_pretrained(kind, folder, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        count, one = len(missing), missing[0]
        raise AntherError(f"{folder}: lacks {count} of the weights that config.json names ({one}, …): copy it again")
    return network.eval()


def from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """What diffusers makes of a folder; AntherError if nothing."""
    import torch  # slow import, so only here: whoever asks where a base lies comes by

    options |= {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    try:
        with quiet():
            return kind.from_pretrained(folder, **options)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged or foreign file
        reason = " ".join(str(error).split())[:200]
        raise AntherError(f"{folder}: can't load {kind.__name__} ({reason}): copy it again") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without a word from the libraries, who miss what we leave out and image processors that nobody needs."""
    import diffusers  # slow import, so only here
    import huggingface_hub
    import transformers

    loggers = [library.utils.logging for library in (diffusers, transformers, huggingface_hub)]
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    for logger in loggers[:2]:
        logger.disable_progress_bar()  # of loading; the hub's is of fetching
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
