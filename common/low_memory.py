"""Start a process that uses little memory. The environment must be set before Python and its libraries are loaded.

os.execve(sys.executable, sys.orig_argv, {**os.environ, **low_memory.ENVIRONMENT})
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=262144:glibc.malloc.hugetlb=1",
}
"""Large buffers are allocated from the system and returned to it, instead of leaving holes in the heap that fit no
other buffer. They use huge pages where the kernel has them, since a page fault per 4 KiB takes a quarter of a step's
time.
"""

_UNNEEDED = ("transformers", "peft", "accelerate", "scipy")  # diffusers imports them if they are installed


@contextmanager
def imports() -> Iterator[None]:
    """Hide libraries that a network doesn't need from diffusers, within this context. Saves 100 MB.

    They can be imported afterwards, but pipelines stay unavailable. Use it in processes that only train.
    """
    hidden = [name for name in _UNNEEDED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: as if not installed
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
