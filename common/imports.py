"""Import large libraries without garbage collections in between."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause garbage collection within this context, for imports.

    The objects of a module stay until the end of the process. The collector would traverse those of torch, transformers
    and diffusers a thousand times without finding garbage, which takes a sixth of the time of their imports.
    """
    if not gc.isenabled():  # paused further out, or by the user
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
