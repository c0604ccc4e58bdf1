"""How a process with little memory starts: what can be said only before Python and its libraries are there.

os.execve(sys.executable, sys.orig_argv, {**os.environ, **lean.ENVIRONMENT})
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=262144:glibc.malloc.hugetlb=1",
}
"""Large buffers come from the system and go back to it, rather than leave holes in the heap that no other buffer fits;
in huge pages, where the kernel has them, since a fault for every 4 KiB takes a quarter of a step's time."""

_UNNEEDED = ("transformers", "peft", "accelerate", "scipy")  # diffusers imports them wherever they are installed


@contextmanager
def imports() -> Iterator[None]:
    """Within this context diffusers is imported without the libraries that a network doesn't need: 100 MB less.

    They can be imported afterwards, but pipelines stay unavailable in this process: for one that trains and does
    nothing else.
    """
    hidden = [name for name in _UNNEEDED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: as if not installed
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
