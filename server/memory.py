"""A limit on the memory that a piece of work takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_at_most(extra: int) -> Iterator[None]:
    """Within it, taking more than `extra` bytes on top of what the process has raises MemoryError.

    On Linux; elsewhere nothing is limited. What the process has includes memory that it freed and its allocator kept,
    which can be taken again without a limit.
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
