"""The system calls of the file layer, counted, so that each of them can be made to go wrong.

`kvstore.files` reaches the system through the module `os`; here another object stands in for it.
Above it nothing is replaced: what is tried is what runs in production.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kvstore import files

COUNTED = frozenset(
    (
        "open", "pread", "preadv", "pwrite", "pwritev", "ftruncate", "posix_fallocate",
        "fdatasync", "fsync", "unlink", "rename", "fstat", "listdir", "close",
    )
)  # fmt: skip
WRITES = frozenset(("pwrite", "pwritev"))
READS = frozenset(("pread", "preadv"))
SYNCS = frozenset(("fdatasync", "fsync"))
SECTOR_BYTES = 512


class Call(NamedTuple):
    """One call that is about to be made."""

    number: int
    """From 1 on."""
    name: str
    arguments: tuple[Any, ...]
    make: Callable[..., Any]
    """The call itself, to be made with these arguments or with others."""

    def complete(self) -> Any:
        """Makes the call as it was meant."""
        return self.make(*self.arguments)

    def partly(self, size_bytes: int) -> Any:
        """Makes a read or write of fewer bytes; its answer says how many."""
        handle, data, offset = self.arguments
        if self.name == "pread":
            return self.make(handle, size_bytes, offset)
        if self.name == "pwrite":
            return self.make(handle, memoryview(data)[:size_bytes], offset)
        return self.make(handle, _leading(data, size_bytes), offset)

    @property
    def size_bytes(self) -> int:
        """How much a read or write asks for."""
        data = self.arguments[1]
        if self.name == "pread":
            return int(data)
        views = [data] if self.name == "pwrite" else data
        return sum(memoryview(view).nbytes for view in views)


Through = Callable[[Call], Any]
"""What is done instead of a call; usually it makes the call."""


class SystemCalls:
    """Stands in for the module `os`: calls that do I/O go through `through`."""

    def __init__(self, through: Through = Call.complete) -> None:
        self.through = through
        self.count = 0
        self.made: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in COUNTED:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            self.made[name] += 1

            def make(*arguments: Any) -> Any:
                return real(*arguments, **options)

            return self.through(Call(self.count, name, arguments, make))

        return call


@contextlib.contextmanager
def standing_in(calls: SystemCalls) -> Iterator[SystemCalls]:
    """Inside, the file layer's system calls go through `calls`."""
    layer: Any = files
    layer.os = calls
    try:
        yield calls
    finally:
        layer.os = os


def _leading(views: Any, size_bytes: int) -> list[memoryview]:
    leading = []
    for view in views:
        part = memoryview(view).cast("B")[:size_bytes]
        size_bytes -= len(part)
        leading.append(part)
    return [part for part in leading if len(part)]
