"""The node's arena as this process has it mapped, and copies from and to it."""

import ctypes
import mmap
import os
import time
from pathlib import Path
from typing import NamedTuple

PIECE_OF_CACHE = 0.75
"""Of the second cache is copied at a time. glibc moves what is as large as that cache, or larger,
with stores that first read what they overwrite, and what is smaller without (rep movsb), which is a
tenth faster."""
LEAST_CACHE_BYTES = 512 << 10
"""What is taken for granted of processors where there is such a difference."""
PIECE_S = 0.001
"""A piece that takes longer, many times what it should, waited for the interpreter's lock."""

_SECOND_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_MADV_POPULATE_WRITE = 23
"""madvise(2); Python has no name for it yet."""


class ArenaMemory(NamedTuple):
    """All of an arena, for who has to know where it lies: a GPU's driver, say."""

    memory: memoryview
    slab_bytes: int
    """No slot lies across a multiple of it; 0: not known."""


class MappedArena:
    """`size_bytes` of the node's memory. Which of them may be touched, the node says.

    Copies drop the interpreter's lock, so that other threads go on meanwhile; in pieces, between
    which they take it back.
    """

    def __init__(self, file: int, size_bytes: int) -> None:
        """Maps the file and lets go of it. Raises OSError, or ValueError if it is too short."""
        try:
            self._map = mmap.mmap(file, size_bytes, flags=mmap.MAP_SHARED)
        finally:
            os.close(file)
        self._size_bytes = size_bytes
        self._view = memoryview(self._map)
        self._address = _address_of(self._view)
        self._most_bytes = int(_second_cache_bytes() * PIECE_OF_CACHE)
        # All page tables now: each page's first touch costs as much as copying it. Not by mmap
        # itself, which would keep the interpreter's lock; where the kernel is too old, then later.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(self._address), ctypes.c_size_t(size_bytes), _MADV_POPULATE_WRITE
        )

    @property
    def memory(self) -> memoryview:
        """All of it."""
        return self._view

    def view(self, offset: int, size: int) -> memoryview:
        """A slot. Raises ValueError for a place outside the arena."""
        self._check(offset, size)
        return self._view[offset : offset + size]

    def write(self, offset: int, block: memoryview) -> None:
        """Copies a block into its slot. Raises ValueError for a place outside the arena."""
        self._check(offset, len(block))
        if block.readonly:  # Its address is not to be had; the lock is kept then.
            self._view[offset : offset + len(block)] = block
        else:
            self._copy(_address_of(block), self._address + offset, len(block))

    def read(self, offset: int, into: memoryview) -> None:
        """Copies a slot into a buffer. Raises ValueError for a place outside the arena."""
        self._check(offset, len(into))
        self._copy(self._address + offset, _address_of(into), len(into))

    def _copy(self, source: int, target: int, size: int) -> None:
        """In pieces, as long as nobody else is after the lock, which is taken back after each."""
        pieces = -(-size // self._most_bytes)
        piece = -(-size // (pieces * mmap.PAGESIZE)) * mmap.PAGESIZE
        done, begun_s = 0, time.perf_counter()
        while done + piece < size:
            ctypes.memmove(target + done, source + done, piece)
            done += piece
            ended_s = time.perf_counter()
            if ended_s - begun_s > PIECE_S:
                break
            begun_s = ended_s
        ctypes.memmove(target + done, source + done, size - done)

    def _check(self, offset: int, size: int) -> None:
        if offset + size > self._size_bytes:
            raise ValueError(f"{size} bytes at {offset} are not in the arena")


def _second_cache_bytes() -> int:
    """As the kernel says; what is taken for granted where it does not."""
    try:
        said_bytes = int(_SECOND_CACHE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        said_bytes = 0
    return max(said_bytes, LEAST_CACHE_BYTES)


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
