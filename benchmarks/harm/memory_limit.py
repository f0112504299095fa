"""A ceiling for what a part of a program may take from the system."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def spare_memory(spare_bytes: int) -> Iterator[None]:
    """Inside, an allocation that exceeds today's size by `spare_bytes` raises MemoryError.

    Pages that are never touched count as well, so that a length which somebody believed shows.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now_bytes = pages * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = now_bytes + spare_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(soft, most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
