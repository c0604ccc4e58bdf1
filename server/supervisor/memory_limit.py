"""Limit on the memory of a block of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Limit new memory to `extra` bytes above the process's current size; exceeding it raises MemoryError.

    Only Linux is supported; elsewhere nothing is limited. The current size includes freed memory that the allocator
    kept, which can be reused without limit.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    import resource

    used = int(re.findall(r"VmData:\s+(\d+) kB", status.read_text())[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [used + extra, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
