"""Buffers on the way to and from files: whole pages, aligned, and used again.

Direct I/O wants memory that begins on a page. Fresh pages cost several times a copy, so that
buffers are kept and lent again.
"""

import mmap
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

LEAST_BYTES = 1 << 16


class Staging:
    """Lends buffers; keeps up to `keep_bytes` of those that came back. Any thread may call."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._kept_bytes = 0
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
        self._lock = threading.Lock()

    def borrow(self, size: int) -> "Loan":
        """A buffer of at least `size` bytes, whose content is undefined, until it is returned."""
        capacity = max(LEAST_BYTES, 1 << (size - 1).bit_length())
        with self._lock:
            free = self._free[capacity]
            pages = free.pop() if free else None
            if pages is not None:
                self._kept_bytes -= capacity
        return Loan(self, pages or mmap.mmap(-1, capacity), size)

    @contextmanager
    def lent(self, size: int) -> Iterator[memoryview]:
        """A buffer for the length of a block of code."""
        loan = self.borrow(size)
        try:
            yield loan.view
        finally:
            loan.give_back()

    def take(self, pages: mmap.mmap) -> None:
        """Keeps what came back, or lets go of it."""
        with self._lock:
            if self._kept_bytes + len(pages) <= self._keep_bytes:
                self._kept_bytes += len(pages)
                self._free[len(pages)].append(pages)


class Loan:
    """A borrowed buffer. `view` is writable and exactly as long as asked."""

    __slots__ = ("_pages", "_staging", "view")

    def __init__(self, staging: Staging, pages: mmap.mmap, size: int) -> None:
        self._staging = staging
        self._pages: mmap.mmap | None = pages
        self.view = memoryview(pages)[:size]

    def give_back(self) -> None:
        """Ends the loan; later calls change nothing. `view` may not be used afterwards."""
        if self._pages is not None:
            pages, self._pages = self._pages, None
            self._staging.take(pages)
